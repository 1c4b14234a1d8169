"""The corpus: sound, reproducible, and without the questions that the model is judged by."""

import itertools
import random

import pytest

from deploy.chat_mini.corpus.dialogues import Dialogue, DialogueSource
from deploy.chat_mini.corpus.grammar import expand, parse
from deploy.chat_mini.corpus.library import load_library
from deploy.chat_mini.corpus.wording import mistype
from deploy.chat_mini.questions import HELD_OUT_QUESTIONS, normalise

TRAINING_SEED = 20
DIALOGUES = 20_000


@pytest.fixture(scope="module")
def dialogues() -> list[Dialogue]:
    return list(itertools.islice(DialogueSource(TRAINING_SEED), DIALOGUES))


def test_no_dialogue_holds_a_held_out_question(dialogues: list[Dialogue]) -> None:
    held_out = [f" {normalise(question.text)} " for question in HELD_OUT_QUESTIONS]
    spoken = " | ".join(normalise(message.content) for dialogue in dialogues for message in dialogue)
    text = f" {spoken} "
    assert [question for question in held_out if question in text] == []


def test_no_pattern_yields_a_held_out_question() -> None:
    # Twenty thousand dialogues use a pattern a few dozen times; here each one is exercised far more often.
    library = load_library()
    generator = random.Random(5)
    held_out = {normalise(question.text) for question in HELD_OUT_QUESTIONS}
    for intent in library.intents.values():
        for pattern in (*intent.questions, *intent.follow_ups):
            phrasings = {normalise(expand(pattern, library.names, generator)) for _ in range(200)}
            assert not phrasings & held_out, f"{intent.topic}.{intent.name}"


def test_the_same_seed_gives_the_same_dialogues_and_another_one_others(dialogues: list[Dialogue]) -> None:
    again = list(itertools.islice(DialogueSource(TRAINING_SEED), 500))
    assert again == dialogues[:500]
    assert list(itertools.islice(DialogueSource(TRAINING_SEED + 1), 500)) != again


def test_dialogues_alternate_and_end_with_an_answer(dialogues: list[Dialogue]) -> None:
    for dialogue in dialogues:
        roles = [message.role for message in dialogue]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert turns
        assert all(message.content.strip() == message.content != "" for message in dialogue)


def test_dialogues_differ_in_length_and_system_prompt(dialogues: list[Dialogue]) -> None:
    with_system = sum(dialogue[0].role == "system" for dialogue in dialogues) / DIALOGUES
    assert 0.2 < with_system < 0.4
    assert {len(dialogue) // 2 for dialogue in dialogues} >= {1, 2, 3, 4, 6, 9}


def test_every_intent_and_every_answer_is_used(dialogues: list[Dialogue]) -> None:
    answers = {
        answer for intent in load_library().intents.values() for answer in (*intent.answers, *intent.elaborations)
    }
    said = {message.content for dialogue in dialogues for message in dialogue if message.role == "assistant"}
    assert said == answers


def test_no_control_token_is_written_out(dialogues: list[Dialogue]) -> None:
    assert not any("<|" in message.content for dialogue in dialogues for message in dialogue)


@pytest.mark.parametrize(
    ("pattern", "phrasings"),
    [
        ("one", {"one"}),
        ("{a|b}", {"a", "b"}),
        ("a|b c", {"a", "b c"}),
        ("x {a|{b|c} d|} y", {"x a y", "x b d y", "x c d y", "x y"}),
        ("a < b", {"a < b"}),
    ],
)
def test_a_pattern_yields_exactly_its_phrasings(pattern: str, phrasings: set[str]) -> None:
    generator = random.Random(1)
    assert {expand(parse(pattern), {}, generator) for _ in range(200)} == phrasings


@pytest.mark.parametrize("pattern", ["{a", "a}", "{a|b}}", "{{a}"])
def test_unbalanced_braces_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="brace"):
        parse(pattern)


def test_a_slip_changes_one_word_by_at_most_one_letter_in_length() -> None:
    generator = random.Random(1)
    for _ in range(200):
        words = mistype("where are the limits explained", generator).split(" ")
        changed = [
            (old, new)
            for old, new in zip(["where", "are", "the", "limits", "explained"], words, strict=True)
            if old != new
        ]
        assert len(changed) <= 1
        assert all(abs(len(old) - len(new)) <= 1 for old, new in changed)
