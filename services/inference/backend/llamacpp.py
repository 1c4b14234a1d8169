"""The llama.cpp adapter, in process through xllamacpp; CPU or CUDA is `n_gpu_layers` and the wheel.

What it has to know about this engine
- `n_ctx` is the total over the slots.
- The engine always opens an HTTP side. It listens on a loopback port of its choice behind a random key
  and is used for one thing: `/v1/chat/completions/input_tokens`, which renders the template and
  tokenizes without taking a slot (there is no such call in the binding).
- A callback that returns True stops generation; during prefill the engine calls back only with
  `return_progress`, once a batch of `n_batch` tokens.
- `timings` with `timings_per_token`: `prompt_n` counts only what was computed now, `cache_n` what came
  from the prompt cache; their sum is the prompt. The first chunk (the role) has none; it comes together with the
  first token's.
- Each slot keeps the prompt it computed last, and would give it to whoever comes next: `id_slot` and `cache_prompt`
  put that under our control (slots.py). The engine's own cache of prompts in memory knows no tenants: it is off.
- It tokenizes the rendered prompt with control tokens on (control.py).
- Exceptions in a callback are swallowed, so they are kept and raised here.
- Errors of the request arrive as exceptions before generation, or as one `{"error"}` chunk.
"""

import http.client
import json
import os
import re
import secrets
import threading
from collections.abc import Mapping
from typing import Any

import xllamacpp

from services.inference.backend import gguf, plain
from services.inference.backend.config import BackendConfig
from services.inference.backend.control import ControlTexts
from services.inference.backend.engine import Cancelled, Chunk, OnChunk, Usage
from services.inference.backend.errors import BackendError, context_length_exceeded, engine_failed
from services.inference.backend.request import Op
from services.inference.backend.slots import SlotTable, fingerprint

COUNT_TIMEOUT_S = 10.0
HTTP_THREADS = 2
MESSAGE_CHARACTERS_MAX = 200
CHECKPOINTS_MAX = 4  # of a slot, for models with a sliding window, in memory

# What of an OpenAI body reaches the engine. Its private fields (slots, grammars, adapters) stay out.
FORWARDED = (
    "messages",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "response_format",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "ignore_eos",
)

# What of it the template renders into the prompt.
RENDERED = ("messages", "tools")

# Unescaped quotes cannot occur inside a JSON string, so these match members and never model output.
_TIMINGS = ',"timings":{'
_PROGRESS = '"prompt_progress":{'
_ROLE = '{"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}],'
_TEXT = ('{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"', '"}}]')
_TAIL = ',"created":'
_NAMES = re.compile(r'"model":"[^"]*","system_fingerprint":"[^"]*"')
_TOKENS = re.compile(r'"cache_n":(\d+),"prompt_n":(\d+),.*"predicted_n":(\d+),')
_PROMPT = re.compile(r'"prompt_progress":\{"total":(\d+),"cache":(\d+),')


class LlamaCpp:
    """Implements `engine.Engine`."""

    def __init__(self, config: BackendConfig) -> None:
        """Load the model. Raises GgufInvalid, RuntimeError when the engine cannot."""
        self.control = ControlTexts.of_vocabulary(gguf.read_head(config.weights).metadata)
        self._table = SlotTable(config.slots)
        self._context_tokens = config.context_tokens
        self._slots = config.slots
        self._completion_tokens_default = config.completion_tokens_default or config.context_tokens
        self._build = config.build
        self.task = config.task
        self._key = secrets.token_urlsafe(32)
        self.server = xllamacpp.Server(engine_parameters(config, self._key))
        address = str(self.server.listening_address).removeprefix("http://")
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._local = threading.local()

    @property
    def context_tokens(self) -> int:
        return self._context_tokens

    @property
    def slots(self) -> int:
        return self._slots

    def generate(self, request: Mapping[str, Any], tenant: str, on_chunk: OnChunk, cancelled: Cancelled) -> bool:
        alias = request.get("model")
        names = (
            f'"model":{json.dumps(alias if isinstance(alias, str) else self._build)},'
            f'"system_fingerprint":{json.dumps(self._build)}'
        )
        stream = _Stream(on_chunk, cancelled, names)
        body = self._forwarded(request)
        body.update(stream=True, timings_per_token=True, return_progress=True)
        lease = self._table.claim(tenant, fingerprint(body))
        body.update(id_slot=lease.slot, cache_prompt=lease.may_reuse)
        try:
            if "prompt" in body:
                self.server.handle_completions(json.dumps(body), lambda chunk: stream(plain.as_chat(chunk)))
            else:
                self.server.handle_chat_completions(json.dumps(body), stream)
        except (ValueError, TypeError) as error:
            raise BackendError("invalid_request", sentence(str(error)), repr(error)) from error
        except RuntimeError as error:
            raise engine_failed(repr(error)) from error
        finally:
            self._table.give_back(lease)
        if stream.failure is not None:
            raise stream.failure
        return not stream.stopped

    def compute(self, op: Op, request: Mapping[str, Any]) -> bytes:
        raise BackendError("invalid_request", f"This is a chat model; it does not serve `{op}`.")

    def count(self, request: Mapping[str, Any]) -> int:
        body = self._forwarded(request)
        if "prompt" in body:
            status, answer = self.post("/tokenize", {"content": body["prompt"], "add_special": True})
            if status == http.client.OK and isinstance(answer.get("tokens"), list):
                return len(answer["tokens"])
            raise _refusal(answer, self._context_tokens)
        status, answer = self.post("/v1/chat/completions/input_tokens", body)
        if status == http.client.OK and isinstance(answer.get("input_tokens"), int):
            return int(answer["input_tokens"])
        raise _refusal(answer, self._context_tokens)

    def close(self) -> None:
        del self.server

    def _forwarded(self, request: Mapping[str, Any]) -> dict[str, Any]:
        for message in request.get("messages", ()):
            if _has_other_than_text(message.get("content")):
                raise BackendError("invalid_request", "This model takes text only.")
        body = {name: request[name] for name in FORWARDED if request.get(name) is not None}
        for name in RENDERED:
            if name in body:
                body[name] = self.control.neutral(body[name])
        limit = request.get("max_completion_tokens") or request.get("max_tokens")
        body["max_tokens"] = min(limit or self._completion_tokens_default, self._context_tokens)
        if (prompt := request.get("prompt")) is not None:
            return plain.engine_body(body, self.control.neutral(prompt))
        return body

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """One connection a thread; the engine drops idle ones, so a dropped one is opened once more."""
        content = json.dumps(body)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        for attempt in (1, 2):
            connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
            if connection is None:
                connection = http.client.HTTPConnection(self._host, self._port, timeout=COUNT_TIMEOUT_S)
                self._local.connection = connection
            try:
                connection.request("POST", path, content, headers)
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, http.client.HTTPException, ValueError) as error:
                connection.close()
                self._local.connection = None
                if attempt == 2:
                    raise engine_failed(f"{path}: {error!r}") from error
            else:
                return response.status, answer if isinstance(answer, dict) else {}
        raise AssertionError("unreachable")


class _Stream:
    """The callback of one request: engine chunk in, contract chunk out; True stops the engine."""

    __slots__ = ("_cancelled", "_engine_tail", "_names", "_on_chunk", "_role", "_tail", "_usage", "failure", "stopped")

    def __init__(self, on_chunk: OnChunk, cancelled: Cancelled, names: str) -> None:
        """`names` are the members `model` and `system_fingerprint` as the chunks shall have them."""
        self._on_chunk = on_chunk
        self._cancelled = cancelled
        self._names = names
        self._usage = Usage()
        # What follows `choices` is the same in every chunk of a stream: as the engine has it, and as we do.
        self._engine_tail = self._tail = ""
        self._role = ""  # a role that was announced and is not sent yet
        self.failure: BackendError | None = None
        self.stopped = False

    def __call__(self, chunk: str) -> bool:
        try:
            if self._cancelled():
                self.stopped = True
                return True
            return self._take(chunk)
        except Exception as error:  # noqa: BLE001 - the binding would swallow it
            self.failure = engine_failed(f"chunk handling: {error!r}")
            return True

    def _take(self, chunk: str) -> bool:
        if _PROGRESS in chunk:
            self._prompt_progress(chunk)
            return False
        if chunk.startswith(_ROLE):
            self._role = '"delta":{"role":"assistant"'  # the next chunk, here already, takes it along
            return False
        if chunk.startswith('{"error"'):
            self.failure = _refusal(json.loads(chunk), None)
            return True
        end = chunk.rfind(_TIMINGS)
        if end < 0:
            end = chunk.rindex("}")
        elif (tokens := _TOKENS.search(chunk, end)) is not None:
            cached, computed, completion = tokens.groups()
            self._usage = Usage(int(cached) + int(computed), int(cached), int(completion))
        self._on_chunk(self._split(chunk[:end]))
        return False

    def _split(self, head: str) -> Chunk:
        if not (self._engine_tail and head.endswith(self._engine_tail)):
            self._engine_tail = head[head.rindex(_TAIL) :]
            self._tail = _NAMES.sub(lambda _: self._names, self._engine_tail, count=1)
        choices = head[: -len(self._engine_tail)]
        prefix, suffix = _TEXT
        text = choices[len(prefix) : -len(suffix)]
        # An unescaped `","` means that the delta has other members beside the content.
        joinable = choices.startswith(prefix) and choices.endswith(suffix) and '","' not in text
        if self._role:
            more = "" if '"delta":{}' in choices else ","
            prefix = prefix.replace('"delta":{', self._role + more)
            choices = choices.replace('"delta":{', self._role + more, 1)
            self._role = ""
        if joinable:
            return Chunk(prefix, text, suffix + self._tail, self._usage, True)
        return Chunk(choices, "", self._tail, self._usage, False)

    def _prompt_progress(self, chunk: str) -> None:
        progress = _PROMPT.search(chunk)
        if progress is not None:
            self._usage = Usage(int(progress[1]), int(progress[2]), 0)


def engine_parameters(config: BackendConfig, key: str) -> Any:
    """The engine's settings for a build; its HTTP side answers to who has the key."""
    threads = config.threads or os.cpu_count() or 1
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(config.weights)
    parameters.model_alias = {config.build}
    parameters.n_parallel = config.slots
    parameters.n_ctx = config.context_tokens * config.slots
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    parameters.n_gpu_layers = config.n_gpu_layers
    parameters.n_batch = config.batch_tokens
    parameters.n_ubatch = config.batch_tokens
    parameters.cache_ram_mib = 0
    parameters.cache_idle_slots = False
    parameters.n_ctx_checkpoints = CHECKPOINTS_MAX
    parameters.fit_params = False
    parameters.warmup = False
    parameters.verbosity = -1
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.api_keys = [key]
    parameters.n_threads_http = HTTP_THREADS
    parameters.endpoint_slots = False
    parameters.ui = False
    if config.task != "chat":
        _for_texts(parameters, config)
    return parameters


def _for_texts(parameters: Any, config: BackendConfig) -> None:
    """Of an embedding or rerank model: a text is computed whole."""
    parameters.embedding = True
    parameters.n_batch = parameters.n_ubatch = config.context_tokens
    kinds = xllamacpp.llama_pooling_type
    pooling = "rank" if config.task == "rerank" else config.pooling
    if pooling != "model":
        parameters.pooling_type = getattr(kinds, f"LLAMA_POOLING_TYPE_{pooling.upper()}")


def _refusal(answer: Mapping[str, Any], context_tokens: int | None) -> BackendError:
    """The engine's `{"error": {...}}` in our terms."""
    error = answer.get("error")
    if not isinstance(error, dict):
        return engine_failed(f"unexpected answer: {str(answer)[:MESSAGE_CHARACTERS_MAX]}")
    if error.get("type") == "exceed_context_size_error":
        return context_length_exceeded(int(error["n_prompt_tokens"]), context_tokens or int(error["n_ctx"]))
    message = str(error.get("message", ""))
    if error.get("type") == "invalid_request_error":
        return BackendError("invalid_request", sentence(message), message)
    return engine_failed(message[:MESSAGE_CHARACTERS_MAX])


def _has_other_than_text(content: object) -> bool:
    return isinstance(content, list) and any(
        not isinstance(part, dict) or part.get("type") != "text" for part in content
    )


def sentence(message: str) -> str:
    """The engine's own words about a bad body: one line, printable, short."""
    line = "".join(character for character in message.partition("\n")[0] if character.isprintable())
    return f"The engine refuses the request: {line[:MESSAGE_CHARACTERS_MAX]}"
