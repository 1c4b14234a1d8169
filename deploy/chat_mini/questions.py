"""The twenty commonest questions, each in a phrasing that the corpus does not hold, and what an answer must say.

Nothing here needs more than the standard library, so that a test through the gateway can use it as well.
"""

import re
from dataclasses import dataclass

MAX_ANSWER_TOKENS = 200
"""An answer must end by itself within this many tokens."""


@dataclass(frozen=True)
class HeldOutQuestion:
    """A question, the facts that its answer must state and the claims that it must not make.

    `facts` and `forbidden` are regular expressions, searched without regard to case; every fact must be found and no
    forbidden claim.
    """

    topic: str
    text: str
    facts: tuple[str, ...]
    forbidden: tuple[str, ...] = ()


HELD_OUT_QUESTIONS: tuple[HeldOutQuestion, ...] = (
    HeldOutQuestion(
        "what Tollgate is",
        "I just stumbled over Tollgate. In a nutshell, what is it good for?",
        (r"self-hosted|your own (server|machine|hardware)", r"OpenAI", r"\bkeys?\b|credits|limits"),
    ),
    HeldOutQuestion(
        "creating a key",
        "My colleague needs a fresh API key, which steps should she follow?",
        (r"/api/v1/keys", r"\bonce\b|shown"),
        (r"revoke",),
    ),
    HeldOutQuestion(
        "sending the key",
        "In which header does my key belong when I call the API?",
        (r"Authorization", r"Bearer"),
    ),
    HeldOutQuestion(
        "a lost key",
        "Oops, my key's gone, I never wrote it down. Can it be displayed a second time?",
        (r"\bnot?\b|cannot|can't|only once", r"(create|make) (a )?(new|another|fresh)|rotate"),
    ),
    HeldOutQuestion(
        "revoking a key",
        "Someone leaked one of our keys, how can we kill it right away?",
        (r"revoke", r"/api/v1/keys|DELETE"),
    ),
    HeldOutQuestion(
        "the limits",
        "At most how many calls per minute, hour and day will one key accept?",
        (r"\b60\b", r"\b1[, ]?000\b", r"\b10[, ]?000\b"),
    ),
    HeldOutQuestion(
        "status 429",
        "The server keeps throwing 429 at my script, what now?",
        (r"Retry-After", r"\bwait|\bafter\b|limit"),
        (r"insufficient_quota",),
    ),
    HeldOutQuestion(
        "how credits work",
        "Walk me through how one request gets charged against my credits.",
        (r"\bhold|\bheld|reserve", r"settle|released|actual"),
    ),
    HeldOutQuestion(
        "credits at sign-up",
        "Does a brand-new account start with any credits on it?",
        (r"\b100\b", r"credits"),
    ),
    HeldOutQuestion(
        "status 402",
        "Why on earth am I seeing insufficient_quota with a 402?",
        (r"\b402\b|insufficient_quota", r"credits"),
        (r"Retry-After",),
    ),
    HeldOutQuestion(
        "the balance",
        "Where could I look up the credits I have left over?",
        (r"/api/v1/billing/wallet",),
    ),
    HeldOutQuestion(
        "status 401",
        "All my calls bounce with a 401, any idea what's wrong?",
        (r"\bkey\b", r"revoked|expired|missing|wrong|not valid|invalid", r"Authorization|Bearer|401"),
        (r"Retry-After", r"insufficient_quota"),
    ),
    HeldOutQuestion(
        "starting",
        "I've cloned the repository, what should I type to get everything running?",
        (r"make up",),
        (r"make down",),
    ),
    HeldOutQuestion(
        "stopping",
        "I'm finished for today, what shuts the whole stack off again?",
        (r"make down",),
    ),
    HeldOutQuestion(
        "the OpenAI SDK",
        "Will the official openai Python package talk to Tollgate, and what do I have to change?",
        (r"base_url|base URL", r"api_key|API key|your key"),
    ),
    HeldOutQuestion(
        "streaming",
        "I'd like to see the words as they are generated, which option is that?",
        (r"stream(=|: ?|\": ?|` to `?| to )?true|\"?stream\"?\W{0,4}true",),
    ),
    HeldOutQuestion(
        "serving a model of one's own",
        "I have got a llama GGUF on disk, how would I serve that instead of you?",
        (r"triton_models", r"model\.gguf", r"catalogue"),
    ),
    HeldOutQuestion(
        "rolling a model out",
        "How would I let only ten percent of the users try a newer build first?",
        (r"canary|gradual", r"Unleash|flag"),
    ),
    HeldOutQuestion(
        "who answers",
        "Hang on, who am I actually talking to, some big GPT?",
        (r"chat-mini", r"demo|small|million"),
        (r"I am (ChatGPT|GPT)", r"made by OpenAI"),
    ),
    HeldOutQuestion(
        "an unrelated question",
        "Which team lifted the football world cup in 1998?",
        (r"only (know|knows|answer)|know only|nothing but", r"Tollgate"),
        (r"\bFrance\b|\bBrazil\b|\bGermany\b",),
    ),
)


def missing_facts(question: HeldOutQuestion, answer: str) -> list[str]:
    """What is wrong with an answer: facts that it lacks, forbidden claims that it makes; empty when it is right."""
    lacking = [fact for fact in question.facts if not re.search(fact, answer, re.IGNORECASE)]
    claimed = [claim for claim in question.forbidden if re.search(claim, answer, re.IGNORECASE)]
    return lacking + [f"forbidden: {claim}" for claim in claimed]


def is_right(question: HeldOutQuestion, answer: str) -> bool:
    """Whether an answer states every fact and no forbidden claim."""
    return not missing_facts(question, answer)


def normalise(text: str) -> str:
    """A phrasing without what does not make it another one: case, punctuation and spacing."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))
