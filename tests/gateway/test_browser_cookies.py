"""The access token among a browser's cookies."""

import pytest

from services.gateway.cookies import BrowserCookies, Shown

TOKEN = "aaaa.bbbb.cccc"


@pytest.mark.parametrize(
    "line",
    [
        f"tg_access={TOKEN}",
        f"a=1; tg_access={TOKEN}; b=2",
        f'prefs={{"theme": "dark"}}; tg_access={TOKEN}',  # no cookie by the letter of RFC 6265, and sent all the same
        f"flag; =; a=[1,2]; tg_access={TOKEN}",
        f"tg_access=; xtg_access=x.y.z; tg_access={TOKEN}",
    ],
)
def test_the_token_is_found_whatever_else_is_there(line: str) -> None:
    assert BrowserCookies("http://x").shown(line, "c") == Shown(TOKEN, "c")


@pytest.mark.parametrize(
    "line", ["", "tg_access=", "xtg_access=a.b.c", "a=tg_access=a.b.c", "tg_access=a.b", "tg_access"]
)
def test_nothing_else_is_taken_for_one(line: str) -> None:
    assert BrowserCookies("http://x").shown(line, "c") == Shown(None)


def test_over_https_only_the_name_that_no_other_host_can_set() -> None:
    cookies = BrowserCookies("https://x")
    assert cookies.shown(f"tg_access={TOKEN}", "") == Shown(None)
    assert cookies.shown(f"tg_access={TOKEN}; __Host-tg_access=d.e.f", "") == Shown("d.e.f", "")
