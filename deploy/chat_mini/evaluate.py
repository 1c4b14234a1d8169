"""The held-out questions, answered greedily by a GGUF file in the engine that serves it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xllamacpp

from deploy.chat_mini.questions import HELD_OUT_QUESTIONS, MAX_ANSWER_TOKENS, HeldOutQuestion, missing_facts

CONTEXT_TOKENS = 1024


@dataclass(frozen=True)
class Answer:
    """What a model said, and whether it stopped by itself."""

    text: str
    finish_reason: str


@dataclass(frozen=True)
class Verdict:
    """An answer to a held-out question and what is wrong with it, if anything."""

    question: HeldOutQuestion
    answer: Answer
    missing: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        """All facts there, and the model stopped by itself."""
        return not self.missing and self.answer.finish_reason == "stop"


class Engine:
    """A GGUF file in llama.cpp, one slot, on one thread."""

    def __init__(self, model: Path) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.n_ctx = CONTEXT_TOKENS
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = 1
        parameters.cpuparams_batch.n_threads = 1
        parameters.cache_ram_mib = 0
        parameters.use_jinja = True
        parameters.verbosity = 0
        self._server = xllamacpp.Server(parameters)

    def answer(self, messages: list[dict[str, str]], temperature: float = 0.0) -> Answer:
        """One completion, of at most MAX_ANSWER_TOKENS tokens. Raises RuntimeError where the engine refuses."""
        reply: Any = self._server.handle_chat_completions(
            {"messages": messages, "temperature": temperature, "max_tokens": MAX_ANSWER_TOKENS}
        )
        body = json.loads(reply) if isinstance(reply, str | bytes) else reply
        if "choices" not in body:
            raise RuntimeError(f"the engine refused: {body}")
        choice = body["choices"][0]
        return Answer(choice["message"]["content"], choice["finish_reason"])

    def ask(self, question: str) -> Answer:
        """The greedy answer to one question without a system prompt."""
        return self.answer([{"role": "user", "content": question}])


def evaluate(model: Path) -> list[Verdict]:
    """Put every held-out question to the model."""
    engine = Engine(model)
    verdicts = []
    for question in HELD_OUT_QUESTIONS:
        answer = engine.ask(question.text)
        verdicts.append(Verdict(question, answer, tuple(missing_facts(question, answer.text))))
    return verdicts
