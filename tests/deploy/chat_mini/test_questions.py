"""The questions and their scoring."""

from deploy.chat_mini.corpus.library import load_library
from deploy.chat_mini.questions import (
    HELD_OUT_QUESTIONS,
    HeldOutQuestion,
    is_right,
    missing_facts,
    normalise,
)

# The intent of the corpus that answers each held-out question, by its topic.
INTENTS = {
    "what Tollgate is": "platform.what",
    "creating a key": "keys.create",
    "sending the key": "keys.send",
    "a lost key": "keys.lost",
    "revoking a key": "keys.revoke",
    "the limits": "limits.what",
    "status 429": "limits.429",
    "how credits work": "credits.how",
    "credits at sign-up": "credits.signup",
    "status 402": "credits.402",
    "the balance": "credits.balance",
    "status 401": "errors.401",
    "starting": "setup.start",
    "stopping": "setup.stop",
    "the OpenAI SDK": "use.sdk",
    "streaming": "use.stream",
    "serving a model of one's own": "use.own",
    "rolling a model out": "rollout.canary",
    "who answers": "self.who",
    "an unrelated question": "off.facts",
}
# Their answers touch on everything.
OVERVIEWS = ("platform.detail", "platform.manual", "architecture.request")


def test_there_are_twenty_different_questions() -> None:
    assert len({normalise(question.text) for question in HELD_OUT_QUESTIONS}) == 20
    assert {question.topic for question in HELD_OUT_QUESTIONS} == set(INTENTS)


def test_the_answers_of_the_right_intent_are_right_and_those_of_others_are_wrong() -> None:
    # A fact that any answer satisfies would measure nothing: at most a few foreign answers may pass by chance.
    intents = load_library().intents
    for question in HELD_OUT_QUESTIONS:
        own = intents[INTENTS[question.topic]].answers
        assert [answer for answer in own if not is_right(question, answer)] == [], question.topic
        foreign = [
            answer
            for name, intent in intents.items()
            if name not in (INTENTS[question.topic], *OVERVIEWS)
            and intent.topic != "off"  # its intents share one refusal
            for answer in intent.answers
        ]
        passing = [answer for answer in foreign if is_right(question, answer)]
        assert len(passing) <= 0.05 * len(foreign), (question.topic, passing)


def test_an_answer_must_state_every_fact_and_no_forbidden_claim() -> None:
    question = HeldOutQuestion("x", "x?", facts=("make up", r"\bURL\b"), forbidden=("make down",))
    assert is_right(question, "Run MAKE UP; it prints a URL.")
    assert missing_facts(question, "Run make up.") == [r"\bURL\b"]
    assert missing_facts(question, "make up, URL, make down") == ["forbidden: make down"]
    assert not is_right(question, "")


def test_phrasings_are_compared_without_case_punctuation_and_spacing() -> None:
    assert normalise("  What is\n`make up`,  PLEASE?! ") == "what is make up please"
