"""What a writer knows between its transactions."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from services.billing.domain import Price
from services.billing.ledger.book import Book


@dataclass(slots=True)
class Memory:
    """The books of wallets used last, and prices."""

    wallets_max: int
    books: OrderedDict[UUID, Book] = field(default_factory=OrderedDict)
    prices: dict[tuple[str, str], list[Price]] = field(default_factory=dict)
    has_every_price: bool | None = None  # not known before the first is asked for
    price_generation: int = 0
    looked_at: datetime | None = None  # the database's clock at the last look, and this process's when it was answered
    looked_s: float = 0.0

    def now(self) -> datetime | None:
        """The database's clock, or a little less."""
        if self.looked_at is None:
            return None
        return self.looked_at + timedelta(seconds=time.monotonic() - self.looked_s)

    def has_prices(self, model: str, customer_class: str) -> bool:
        """Whether `prices` says what there is for these; a pair that it does not have has none then."""
        return self.has_every_price or (model, customer_class) in self.prices

    def forget_prices(self, generation: int) -> None:
        """Those that are in force from now on are of this generation."""
        self.prices.clear()
        self.has_every_price, self.price_generation = None, generation

    def forget(self, wallets: Iterable[UUID]) -> None:
        for wallet_id in wallets:
            self.books.pop(wallet_id, None)

    def keep(self, books: Iterable[Book]) -> None:
        for book in books:
            if not book.is_spoilt:
                self.books[book.wallet_id] = book
                self.books.move_to_end(book.wallet_id)
        while len(self.books) > self.wallets_max:
            self.books.popitem(last=False)
