"""How people type: openings, endings, words left out, small letters, missing punctuation, slips of the keyboard."""

import random

from deploy.chat_mini.corpus.grammar import expand
from deploy.chat_mini.corpus.library import Library

_QUESTION_WORDS = (
    *("what", "how", "why", "when", "where", "who", "which", "whose", "is", "are", "am", "do", "does", "did"),
    *("can", "could", "may", "should", "will", "would"),
)
_WISHES = ("I want", "I'd like", "I would like", "I need", "I have to", "I must", "we want", "we'd like", "I wish")
_KEYBOARD = {
    "a": "sq", "b": "vn", "c": "xv", "d": "sf", "e": "wr", "f": "dg", "g": "fh", "h": "gj", "i": "uo", "j": "hk",
    "k": "jl", "l": "k", "m": "n", "n": "bm", "o": "ip", "p": "o", "q": "w", "r": "et", "s": "ad", "t": "ry",
    "u": "yi", "v": "cb", "w": "qe", "x": "zc", "y": "tu", "z": "x",
}  # fmt: skip


def mistype(text: str, generator: random.Random) -> str:
    """The text with one slip in a word of four letters or more: a letter lost, doubled, swapped or a neighbour's."""
    words = text.split(" ")
    candidates = [index for index, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
    if not candidates:
        return text
    index = generator.choice(candidates)
    word = words[index]
    at = generator.randrange(1, len(word) - 1)
    slip = generator.randrange(4)
    if slip == 0:
        word = word[:at] + word[at + 1 :]
    elif slip == 1:
        word = word[:at] + word[at] + word[at:]
    elif slip == 2:
        word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    else:
        word = word[:at] + generator.choice(_KEYBOARD.get(word[at].lower(), word[at])) + word[at + 1 :]
    words[index] = word
    return " ".join(words)


def shorten(text: str, generator: random.Random) -> str:
    """The text without one or two of its words, as in a note; texts of up to three words stay."""
    words = text.split(" ")
    for _ in range(generator.choice((1, 1, 2))):
        if len(words) > 3:
            del words[generator.randrange(len(words))]
    return " ".join(words)


def _begin_sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _punctuate(text: str, generator: random.Random) -> str:
    if text[-1] in ".?!":
        return text
    words = text.lower().replace(",", " ").split()
    is_question = words[0] in _QUESTION_WORDS or (len(words) > 1 and generator.random() < 0.3)
    return text + ("?" if is_question else generator.choice((".", ".", "", "!")))


def phrase(question: str, library: Library, generator: random.Random) -> str:
    """A question as somebody might type it; about a quarter is left nearly as it is."""
    text = question
    names = library.names
    if generator.random() < 0.15:
        text = shorten(text, generator)
    if text.startswith(_WISHES) and generator.random() < 0.5:
        text += expand((names["tail"],), names, generator)
    elif generator.random() < 0.18:
        text = f"{text} {expand((names['ending'],), names, generator)}"
        text = text.replace(" ?", "?").replace(" !", "!").replace(" ,", ",")
    elif generator.random() < 0.1:
        text = f"{text} {expand((names['clause'],), names, generator)}"
    text = _punctuate(text, generator)
    if generator.random() < 0.18:
        text = f"{expand((names['opening'],), names, generator)} {text}"
    if generator.random() < 0.5:
        text = _begin_sentence(text)
    if generator.random() < 0.2:
        text = f"{expand((names['preamble'],), names, generator)} {_begin_sentence(text)}"
    habit = generator.random()
    if habit < 0.22:
        text = text.lower()
    elif habit < 0.24:
        text = text.upper()
    if generator.random() < 0.2:
        text = text.rstrip(".?!") or text
    while generator.random() < 0.09:
        text = mistype(text, generator)
    return text
