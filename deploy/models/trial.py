"""Loads a GGUF in the engine and lets it generate: `python -m deploy.models.trial FILE KIND`, in .venv-triton.

Prints one JSON line: {"tokens": n, "text": …} or {"error": …}. In a process of its own: a broken model can end it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import xllamacpp

CONTEXT_TOKENS = 256
TOKENS = 8


def engine(path: str, kind: str) -> Any:
    """The engine with one small slot. Raises RuntimeError."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_parallel = 1
    parameters.n_ctx = CONTEXT_TOKENS
    parameters.cache_ram_mib = 0
    parameters.fit_params = False
    parameters.warmup = False
    parameters.port = 0
    parameters.ui = False
    if kind != "chat":
        parameters.embedding = True
        pooling = xllamacpp.llama_pooling_type
        parameters.pooling_type = (
            pooling.LLAMA_POOLING_TYPE_RANK if kind == "rerank" else pooling.LLAMA_POOLING_TYPE_UNSPECIFIED
        )
    return xllamacpp.Server(parameters)


def parsed(answer: Any) -> Any:
    """The engine answers with a document, or with its text."""
    return json.loads(answer) if isinstance(answer, str | bytes) else answer


def attempt(path: str, kind: str) -> dict[str, Any]:
    """One completion, or one embedding."""
    server = engine(path, kind)
    if kind == "rerank":
        answer = server.handle_rerank({"query": "a", "documents": ["a", "b"]})
        return {"tokens": len(parsed(answer)["results"]), "text": ""}
    if kind == "embedding":
        answer = server.handle_embeddings({"input": "hello"})
        return {"tokens": len(parsed(answer)["data"][0]["embedding"]), "text": ""}
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": TOKENS, "ignore_eos": True}
    answer = parsed(server.handle_chat_completions(body))
    if "error" in answer:
        return {"error": str(answer["error"].get("message", answer["error"]))}
    text = answer["choices"][0]["message"].get("content") or ""
    return {"tokens": answer["usage"]["completion_tokens"], "text": text}


def main(arguments: Sequence[str]) -> int:
    try:
        result = attempt(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever the engine has against the file is the answer
        result = {"error": str(error) or type(error).__name__}
    print(json.dumps(result), flush=True)
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
