"""Money is exact: parsing, printing, rounding, and what does not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.domain import INT8_MAX, TOKENS_MAX, PriceTerms, Usage, parse_credits
from shared.errors import InvalidRequest
from shared.money import format_credits
from tests.billing import oracle

MILLION = 10**6
prices = st.integers(0, 10**12)
tokens = st.integers(0, 10**7)


@st.composite
def terms(draw: st.DrawFn) -> PriceTerms:
    plain = draw(prices)
    return PriceTerms(draw(prices), plain, draw(st.integers(0, plain)), draw(prices))


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    plain = draw(tokens)
    return Usage(plain, draw(st.integers(0, plain)), draw(tokens))


@given(st.integers(0, INT8_MAX))
def test_an_amount_survives_printing_and_parsing(nano: int) -> None:
    assert parse_credits(format_credits(nano)) == nano


@pytest.mark.parametrize(
    ("nano", "text"),
    [(0, "0.00"), (1, "0.000000001"), (10**11, "100.00"), (99_999_370_000, "99.99937"), (-1_500_000_000, "-1.50")],
)
def test_credits_print_with_two_to_nine_decimals(nano: int, text: str) -> None:
    assert format_credits(nano) == text


@pytest.mark.parametrize(
    "text", ["", "-1", "+1", "1e3", "1.", ".5", "1.0000000001", "9223372036.854775808", "1,5", "NaN", "١", "1\n"]
)
def test_what_is_not_an_exact_amount_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_credits(text)


@given(terms(), usages())
def test_the_cost_is_the_exact_sum_rounded_up_once(price: PriceTerms, usage: Usage) -> None:
    assert price.cost(usage) == oracle.cost(price, usage)


@given(terms(), usages(), usages())
def test_merging_two_requests_never_costs_more_and_saves_at_most_one_rounding(
    price: PriceTerms, one: Usage, two: Usage
) -> None:
    merged = Usage(
        one.input_tokens + two.input_tokens,
        one.cached_input_tokens + two.cached_input_tokens,
        one.output_tokens + two.output_tokens,
    )
    split = price.cost(one) + price.cost(two)
    assert 0 <= split - price.cost(merged) - price.per_request <= 1


@given(terms(), usages(), st.integers(0, INT8_MAX))
def test_a_clamp_is_the_most_that_is_affordable(price: PriceTerms, usage: Usage, budget: int) -> None:
    covered = price.output_tokens_within(usage, budget)
    if covered >= 0:
        assert price.cost(Usage(usage.input_tokens, usage.cached_input_tokens, covered)) <= budget
    if covered < usage.output_tokens:
        more = Usage(usage.input_tokens, usage.cached_input_tokens, covered + 1)
        assert price.cost(more) > budget


def test_a_cost_beyond_int8_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        PriceTerms(0, INT8_MAX, 0, INT8_MAX).cost(Usage(TOKENS_MAX, 0, TOKENS_MAX))
    with pytest.raises(InvalidRequest):
        PriceTerms(INT8_MAX, 0, 0, 1).cost(Usage(0, 0, 1))
    assert PriceTerms(INT8_MAX, 0, 0, 0).cost(Usage(5, 0, 5)) == INT8_MAX


@pytest.mark.parametrize("figures", [(-1, 0, 0), (0, 0, -1), (1, 2, 0), (TOKENS_MAX + 1, 0, 0)])
def test_impossible_usage_is_refused(figures: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidRequest):
        Usage(*figures)


def test_cached_input_is_never_dearer_than_input() -> None:
    with pytest.raises(InvalidRequest):
        PriceTerms(0, 1, 2, 0)
