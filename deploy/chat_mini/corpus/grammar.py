"""Phrasings from patterns: `{one|two|}` is a choice (it may be empty and may nest), `<name>` a named choice."""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

_PIECE = re.compile(r"[{}|]|<[a-z_]+>|[^{}|<]+|<")
_ONSETS = ("b", "br", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kl", "l", "m", "n", "p", "pr", "qu")
_MORE_ONSETS = ("r", "s", "sh", "sk", "st", "str", "t", "th", "tr", "v", "w", "x", "y", "z", "")
_VOWELS = ("a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ea", "ee", "ie", "oo", "ou", "y")
_CODAS = ("", "", "", "b", "ck", "d", "g", "l", "ll", "m", "n", "nd", "ng", "nt", "p", "r", "rt", "s", "st", "t", "x")

INVENTED_WORD = "pseudo"
"""The name, as <pseudo>, for a word that means nothing: whatever the model has never seen."""


@dataclass(frozen=True)
class Text:
    """Words that stand for themselves."""

    words: str


@dataclass(frozen=True)
class Name:
    """A reference to a named choice."""

    name: str


@dataclass(frozen=True)
class Choice:
    """One of several sequences."""

    options: tuple[tuple["Text | Name | Choice", ...], ...]


Sequence = tuple[Text | Name | Choice, ...]


def parse(pattern: str) -> Sequence:
    """The tree of a pattern. Raises ValueError where braces do not match."""
    return _parse_options(f"{{{pattern}}}" if _has_outer_bar(pattern) else pattern)


def parse_choice(pattern: str) -> Choice:
    """The tree of `one|two|three`, without the outer braces."""
    (choice,) = _parse_options(f"{{{pattern}}}")
    assert isinstance(choice, Choice)
    return choice


def _has_outer_bar(pattern: str) -> bool:
    depth = 0
    for character in pattern:
        depth += (character == "{") - (character == "}")
        if character == "|" and depth == 0:
            return True
    return False


def _parse_options(pattern: str) -> Sequence:
    stack: list[list[list[Text | Name | Choice]]] = [[[]]]
    for piece in _PIECE.findall(pattern):
        if piece == "{":
            stack.append([[]])
        elif piece == "|":
            stack[-1].append([])
        elif piece == "}":
            if len(stack) == 1:
                raise ValueError(f"a closing brace too many: {pattern}")
            options = stack.pop()
            stack[-1][-1].append(Choice(tuple(tuple(option) for option in options)))
        elif piece.startswith("<") and piece.endswith(">"):
            stack[-1][-1].append(Name(piece[1:-1]))
        else:
            stack[-1][-1].append(Text(piece))
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError(f"a brace is not closed: {pattern}")
    return tuple(stack[0][0])


def invent_word(generator: random.Random) -> str:
    """A pronounceable word of one to three syllables that no topic uses, capitalised half of the time."""
    syllables = [
        generator.choice(_ONSETS + _MORE_ONSETS) + generator.choice(_VOWELS) + generator.choice(_CODAS)
        for _ in range(generator.choice((1, 2, 2, 3)))
    ]
    word = "".join(syllables)
    return word.capitalize() if generator.random() < 0.5 else word


def expand(sequence: Sequence, names: Mapping[str, Choice], generator: random.Random) -> str:
    """One random phrasing of a pattern. Raises KeyError for a name that no choice has."""
    return re.sub(r"\s+", " ", _expand(sequence, names, generator)).strip()


def _expand(sequence: Sequence, names: Mapping[str, Choice], generator: random.Random) -> str:
    parts = []
    for part in sequence:
        if isinstance(part, Text):
            parts.append(part.words)
        elif isinstance(part, Choice):
            parts.append(_expand(generator.choice(part.options), names, generator))
        elif part.name == INVENTED_WORD:
            parts.append(invent_word(generator))
        else:
            parts.append(_expand(generator.choice(names[part.name].options), names, generator))
    return "".join(parts)
