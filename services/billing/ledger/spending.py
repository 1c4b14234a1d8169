"""What budgets count: of each key and member of a wallet that has any."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Literal

Subject = Literal["key", "member"]
Period = Literal["day", "month"]


@dataclass(slots=True)
class Spending:
    """What a key or a member with budgets has spent, by the calendar (UTC), and holds at present.

    Its day never goes back: a clock that is set back over midnight gives nobody a day's budget twice.
    """

    limits: dict[Period, int]
    today: date
    day: int = 0
    month: int = 0
    held: int = 0

    def room(self, today: date) -> int:
        """What it may still hold; negative when a budget was lowered."""
        self._turn(today)
        spent = {"day": self.day, "month": self.month}
        return min(limit - spent[period] for period, limit in self.limits.items()) - self.held

    def add(self, cost: int, today: date) -> None:
        self._turn(today)
        self.day += cost
        self.month += cost

    def _turn(self, today: date) -> None:
        if today <= self.today:
            return
        if (today.year, today.month) != (self.today.year, self.today.month):
            self.month = 0
        self.day, self.today = 0, today
