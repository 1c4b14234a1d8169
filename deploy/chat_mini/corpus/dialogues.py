"""Dialogues of one to several turns, with and without a system prompt, drawn from the library by a seeded generator."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from deploy.chat_mini.corpus.grammar import Sequence, expand, parse
from deploy.chat_mini.corpus.library import Intent, Library, load_library
from deploy.chat_mini.corpus.wording import phrase

_TURN_COUNTS = (1, 2, 3, 4, 6, 9)
_TURN_WEIGHTS = (58, 20, 11, 6, 4, 1)
_WEIGHTS = {
    "off": 2.0,  # what else can be asked has no bounds, so refusals need more practice
    "talk": 4.0,  # a few patterns with many options each
    "platform.manual": 0.25,  # its one answer is as long as twenty others
    "platform.detail": 0.7,
}
"""Share of a topic or an intent beside its number of question patterns."""
_SYSTEM_SHARE = 0.3
_SAME_TOPIC_SHARE = 0.55
_FOLLOW_UP_SHARE = 0.6
_MORE_SHARE = 0.5
_MORE = parse(
    "{tell me more|more details|more details please|go on|can you elaborate|please elaborate|continue|and then|"
    "can you explain that further|say more|what else|in more detail please|more|anything else|how exactly|explain}"
)
_SYSTEM = parse(
    "{You are a {helpful|friendly|kind|concise|polite|useful} {assistant|chatbot|AI assistant|bot|AI}.|"
    "You are chat-mini{|, the demo model of Tollgate|, a small model}.|"
    "You are {a support agent|an expert|an assistant} {for|of} Tollgate.|"
    "You help {users|customers|developers|operators} {of|with} Tollgate.}"
    "{|| Answer {briefly|in one sentence|shortly|politely|truthfully|clearly|in English}.|"
    " Be {brief|concise|friendly|polite|honest|precise}.| Keep {answers|it} short.| Do not make things up.}"
)


@dataclass(frozen=True)
class Message:
    """One message of a dialogue, in OpenAI's terms."""

    role: str
    content: str


Dialogue = tuple[Message, ...]


def _weight(intent: Intent) -> float:
    share = _WEIGHTS.get(f"{intent.topic}.{intent.name}", _WEIGHTS.get(intent.topic, 1.0))
    return len(intent.questions) * share


class DialogueSource:
    """An endless, reproducible stream of dialogues."""

    def __init__(self, seed: int, library: Library | None = None) -> None:
        self._library = library or load_library()
        self._generator = random.Random(seed)  # noqa: S311  # reproducible, not secret
        self._intents = list(self._library.intents.values())
        self._topics = self._library.topics()

    def __iter__(self) -> Iterator[Dialogue]:
        while True:
            yield self._dialogue()

    def _expand(self, sequence: Sequence) -> str:
        return expand(sequence, self._library.names, self._generator)

    def _dialogue(self) -> Dialogue:
        generator = self._generator
        messages: list[Message] = []
        if generator.random() < _SYSTEM_SHARE:
            messages.append(Message("system", self._expand(_SYSTEM)))
        previous: Intent | None = None
        remaining = generator.choices(_TURN_COUNTS, _TURN_WEIGHTS)[0]
        while remaining > 0:
            intent = self._next_intent(previous)
            self._add_turn(messages, self._question(intent, previous), generator.choice(intent.answers))
            if intent.elaborations and remaining > 1 and generator.random() < _MORE_SHARE:
                self._add_turn(messages, self._expand(_MORE), generator.choice(intent.elaborations))
                remaining -= 1
            previous = intent
            remaining -= 1
        return tuple(messages)

    def _add_turn(self, messages: list[Message], question: str, answer: str) -> None:
        messages.append(Message("user", phrase(question, self._library, self._generator)))
        messages.append(Message("assistant", answer))

    def _next_intent(self, previous: Intent | None) -> Intent:
        if previous is not None and self._generator.random() < _SAME_TOPIC_SHARE:
            return self._draw(self._topics[previous.topic])
        return self._draw(self._intents)

    def _draw(self, intents: list[Intent]) -> Intent:
        weights = [_weight(intent) for intent in intents]
        return self._generator.choices(intents, weights)[0]

    def _question(self, intent: Intent, previous: Intent | None) -> str:
        follows = previous is not None and (previous.topic == intent.topic or intent.topic in ("talk", "self"))
        if follows and intent.follow_ups and self._generator.random() < _FOLLOW_UP_SHARE:
            return self._expand(self._generator.choice(intent.follow_ups))
        return self._expand(self._generator.choice(intent.questions))
