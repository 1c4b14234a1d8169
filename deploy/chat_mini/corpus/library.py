"""The intents: what may be asked, in which patterns, and what is answered.

A topic file holds `name = choices`, then for each intent a line `# topic.intent`, its questions (`?`), questions that
only make sense after another turn of the topic (`&`), its answers (`!`, with further paragraphs as `>`) and answers to
"tell me more" (`+`). `//` begins a comment. Answers are plain text; only questions are patterns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.chat_mini.corpus.grammar import Choice, Sequence, parse, parse_choice

TOPICS = Path(__file__).parent / "topics"


@dataclass
class Intent:
    """One thing that can be asked, with its phrasings and its answers."""

    topic: str
    name: str
    questions: list[Sequence] = field(default_factory=list)
    follow_ups: list[Sequence] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    elaborations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Library:
    """All intents by name, and the named choices that their questions use."""

    intents: Mapping[str, Intent]
    names: Mapping[str, Choice]

    def topics(self) -> dict[str, list[Intent]]:
        """The intents of each topic."""
        grouped: dict[str, list[Intent]] = {}
        for intent in self.intents.values():
            grouped.setdefault(intent.topic, []).append(intent)
        return grouped


def load_library(directory: Path = TOPICS) -> Library:
    """Read every topic file. Raises ValueError, with file and line, for what does not follow the form."""
    intents: dict[str, Intent] = {}
    names: dict[str, Choice] = {}
    for path in sorted(directory.glob("*.txt")):
        current: Intent | None = None
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            text = line.strip()
            if not text or text.startswith("//"):
                continue
            try:
                current = _read_line(text, current, intents, names)
            except ValueError as error:
                raise ValueError(f"{path.name}:{number}: {error}") from error
    for intent in intents.values():
        if not intent.questions or not intent.answers:
            raise ValueError(f"{intent.topic}.{intent.name} lacks a question or an answer")
    return Library(intents, names)


def _read_line(
    text: str, current: Intent | None, intents: dict[str, Intent], names: dict[str, Choice]
) -> Intent | None:
    mark, _, rest = text.partition(" ")
    if mark == "#":
        topic, _, name = rest.partition(".")
        if not name or rest in intents:
            raise ValueError(f"not a new topic.intent: {rest}")
        intents[rest] = Intent(topic, name)
        return intents[rest]
    if current is None:
        name, separator, choices = text.partition(" = ")
        if not separator or name in names:
            raise ValueError(f"not a new name = choices: {text}")
        names[name] = parse_choice(choices)
    elif mark == "?":
        current.questions.append(parse(rest))
    elif mark == "&":
        current.follow_ups.append(parse(rest))
    elif mark == "!":
        current.answers.append(rest)
    elif mark == ">" and current.answers:
        current.answers[-1] += f"\n\n{rest}"
    elif mark == "+":
        current.elaborations.append(rest)
    else:
        raise ValueError(f"unknown mark {mark!r}")
    return current
