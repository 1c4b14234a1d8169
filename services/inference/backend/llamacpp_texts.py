"""The llama.cpp adapter for models that read texts and write none: embeddings and reranking."""

import base64
import http.client
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from services.inference.backend.engine import Cancelled, OnChunk
from services.inference.backend.errors import BackendError, context_length_exceeded, engine_failed
from services.inference.backend.llamacpp import LlamaCpp, sentence
from services.inference.backend.request import Op

PAIR_TOKENS = 8  # that the engine puts around and between a query and a document


class LlamaCppTexts(LlamaCpp):
    """Implements `engine.Engine`; nothing is kept of a text, so no cache is shared."""

    def generate(self, request: Mapping[str, Any], tenant: str, on_chunk: OnChunk, cancelled: Cancelled) -> bool:
        """Only a probe gets here: anything but texts is refused."""
        if "input" not in request:
            raise BackendError("invalid_request", "This model does not chat.")
        self.compute("embed" if self.task == "embedding" else "rerank", request)
        return not cancelled()

    def compute(self, op: Op, request: Mapping[str, Any]) -> bytes:
        if op == "embed" and self.task == "embedding":
            return self._embed(request["input"])
        if op == "rerank" and self.task == "rerank":
            texts: Sequence[str] = request.get("documents") or request["input"]
            return self._rank(request.get("query") or texts[0], texts)
        raise BackendError("invalid_request", f"This model is for {self.task}; it does not serve `{op}`.")

    def count(self, request: Mapping[str, Any]) -> int:
        if "input" not in request and "documents" not in request:
            raise BackendError("invalid_request", "This model does not chat.")
        extra = self._tokens(request["query"]) + PAIR_TOKENS if "query" in request else 0
        return extra + max(self._tokens(text) for text in request.get("documents") or request["input"])

    def _tokens(self, text: str) -> int:
        status, answer = self.post("/tokenize", {"content": self.control.neutral(text), "add_special": True})
        if status != http.client.OK or not isinstance(answer.get("tokens"), list):
            raise engine_failed(f"/tokenize: {status}")
        return len(answer["tokens"])

    def _embed(self, texts: Sequence[str]) -> bytes:
        answer = self._ask("handle_embeddings", {"input": self.control.neutral(list(texts))})
        found = sorted(answer["data"], key=lambda entry: entry["index"])
        vectors = [base64.b64encode(struct.pack(f"<{len(e['embedding'])}f", *e["embedding"])).decode() for e in found]
        return json.dumps({"data": vectors, "prompt_tokens": answer["usage"]["prompt_tokens"]}).encode()

    def _rank(self, query: str, documents: Sequence[str]) -> bytes:
        body = {"query": self.control.neutral(query), "documents": self.control.neutral(list(documents))}
        answer = self._ask("handle_rerank", body)
        scores = {entry["index"]: entry["relevance_score"] for entry in answer["results"]}
        ordered = [scores[index] for index in range(len(documents))]
        return json.dumps({"data": ordered, "prompt_tokens": answer["usage"]["prompt_tokens"]}).encode()

    def _ask(self, method: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            answer = getattr(self.server, method)(body)
        except (ValueError, TypeError) as error:
            raise BackendError("invalid_request", sentence(str(error)), repr(error)) from error
        except RuntimeError as error:
            raise engine_failed(repr(error)) from error
        found: dict[str, Any] = json.loads(answer) if isinstance(answer, str | bytes) else answer
        if "error" in found:
            message = str(found["error"].get("message", ""))
            if "too large to process" in message:
                raise context_length_exceeded(self.context_tokens + 1, self.context_tokens)
            raise engine_failed(message)
        return found
