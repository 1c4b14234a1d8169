"""What a hold may cover: pure, like the kernel, of which this is a part."""

from __future__ import annotations

from collections.abc import Sequence

from services.billing.domain import INT8_MAX, PriceTerms, Usage
from services.billing.errors import BudgetExceeded, CreditsReserved, InsufficientCredits
from services.billing.ledger.book import Book, Hold, Journal
from services.billing.ledger.spending import Spending

CREDITS_RESERVED_RETRY_S = 2


def covered(
    journal: Journal,
    book: Book,
    terms: PriceTerms,
    spendings: Sequence[Spending],
    worst: Usage,
    least: Usage,
    hold: Hold | None = None,
) -> tuple[Usage, int]:
    """The most from `least` to `worst` that can be had, and what it costs beyond what `hold` has reserved for it.

    They differ in output tokens at most. Raises InsufficientCredits, CreditsReserved, BudgetExceeded.
    """
    held = hold.amount if hold is not None else 0
    owes = book.owed > 0
    wanted, available = terms.cost(worst) - held, 0 if owes else book.available(journal.now)
    room = room_of(spendings, journal)
    if not owes and wanted <= available and wanted <= room:
        return worst, wanted
    fewest = terms.cost(least) - held
    if owes or fewest > available:
        if not owes and fewest <= book.reachable(journal.now) - _own(book, hold, journal):
            raise CreditsReserved(retry_after_s=CREDITS_RESERVED_RETRY_S)
        raise InsufficientCredits()
    if fewest > room:
        raise BudgetExceeded()
    most = worst.with_output(terms.output_tokens_within(worst, held + min(available, room)))
    return most, terms.cost(most) - held


def room_of(spendings: Sequence[Spending], journal: Journal) -> int:
    """What the budgets of a key and a member still allow."""
    return min((spending.room(journal.today) for spending in spendings), default=INT8_MAX)


def _own(book: Book, hold: Hold | None, journal: Journal) -> int:
    """What a hold has reserved of grants that could be drawn: nobody else gives that back."""
    if hold is None:
        return 0
    drawable = {grant.account.id for grant in book.drawable(journal.now)}
    return sum(part.amount for part in hold.slices if part.account_id in drawable)
