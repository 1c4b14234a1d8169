"""The events of a completion as bytes, so that they can be told again."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import orjson

from services.chat.service.events import Delta, Event, Finished, Receipt, Settled, Started
from shared.metering import Usage


@dataclass(frozen=True, slots=True)
class Recording:
    """A complete answer. `created` is in Unix seconds."""

    id: str
    created: int
    events: tuple[Event, ...]

    def encode(self) -> bytes:
        wire = [_entry(event) for event in _joined(self.events)]
        return zlib.compress(orjson.dumps({"id": self.id, "created": self.created, "events": wire}), 1)

    @classmethod
    def decode(cls, content: bytes) -> Recording:
        data = orjson.loads(zlib.decompress(content))
        return cls(data["id"], data["created"], tuple(_event(entry) for entry in data["events"]))


def _joined(events: Iterable[Event]) -> Iterator[Event]:
    """Neighbouring pieces of text of one choice as one."""
    text: Delta | None = None
    for event in events:
        is_text = isinstance(event, Delta) and event.fields.keys() == {"content"} and event.logprobs is None
        if is_text and text is not None and isinstance(event, Delta) and event.index == text.index:
            text = Delta(text.index, {"content": (text.fields["content"] or "") + (event.fields["content"] or "")})
            continue
        if text is not None:
            yield text
        text = event if is_text and isinstance(event, Delta) else None
        if text is None:
            yield event
    if text is not None:
        yield text


def _entry(event: Event) -> list[object]:
    match event:
        case Started():
            return ["started", event.build, event.tier]
        case Delta():
            return ["delta", event.index, event.fields, event.logprobs]
        case Finished():
            return ["finished", event.index, event.reason]
        case Settled():
            used, bill = event.usage, event.receipt
            return [
                "settled",
                [used.input_tokens, used.cached_input_tokens, used.output_tokens],
                [
                    bill.hold_id,
                    bill.build,
                    bill.held_nano,
                    bill.settled_nano,
                    bill.limited_by,
                    bill.cached,
                    bill.available_nano,
                ],
            ]


def _event(entry: list[object]) -> Event:
    kind, *rest = entry
    if kind == "started":
        return Started(*rest)  # type: ignore[arg-type]  # as _entry wrote it
    if kind == "delta":
        return Delta(*rest)  # type: ignore[arg-type]
    if kind == "finished":
        return Finished(*rest)  # type: ignore[arg-type]
    return Settled(Usage(*rest[0]), Receipt(*rest[1]))  # type: ignore[misc]
