"""The chat backend that runs inside Triton's Python stub: one contract for every engine.

Facts for whoever starts tritonserver
- Python 3.11 or 3.12, `numpy<2`, `xllamacpp`; nothing of `shared/` or of the services is imported.
- `triton_models/<build>/1/model.py` appends the repository root (three folders up, links resolved) to
  `sys.path` and imports `services.inference.backend.model`. Where the model repository is *copied* away
  from the code, start tritonserver with PYTHONPATH=<repository root>.
- config.pbtxt names no environment: start tritonserver with the Triton environment's `bin` first in
  PATH, and the stub's embedded interpreter finds that environment's site-packages through pyvenv.cfg.
- Everything else is a `parameters` entry of config.pbtxt: see `config.py` here for names and units.

The contract
- Input REQUEST BYTES[1]: an OpenAI chat body as JSON (or with a bare `prompt` for its `messages`), plus `op`: absent or
  "chat", "count", "probe", "status", or "cancel" with the id of another `request`.
- Request parameters `tg_priority` (int, smaller first, default 2), `tg_tenant` (string), `tg_one_by_one` (1: chunks are
  never joined, so that a caller may stop after any token). The request's
  `timeout` (microseconds) is its deadline, queueing and generating together.
- Output RESPONSE BYTES[1] each: one `chat.completion.chunk`. Its last member is always the cumulative
  `"usage":{"prompt_tokens","completion_tokens","total_tokens","prompt_tokens_details":{"cached_tokens"}}`;
  `model` echoes the body's, `system_fingerprint` is the build. The first chunk carries the role, the one with
  `finish_reason` the final usage; there is no usage chunk with empty choices, whatever `stream_options` says.
  Tokens that pile up while the server is busy arrive as one chunk: count tokens by `usage`, never by chunks.
- `op: count`: one response `{"prompt_tokens": n, "context_tokens": m}`, m per request.
- `op: embed` with `input` (texts): one response `{"data": [base64 of little-endian float32, …], "prompt_tokens"}`;
  `op: rerank` with `query` and `documents`: the same with a score for each document.
- `op: status`: one response `{"context_tokens","slots","slots_busy","queue_depth","silence_ms","idle_ms"}`.
- `op: probe`: the same, at once while the engine works, otherwise when it has generated for the body.
- Errors: a TritonError whose message is `{"code", "message"}`; codes in `errors.py`.
- The stream ends with an empty final response (`triton_final_response`).

Which thread does what
- Triton's thread calls `execute`: it wraps a request into a `Job`, parses it, and refuses or queues it;
- one thread counts the prompts that might not fit, and those of `op: count`, before they can occupy the queue;
- `slots` worker threads take jobs from the fair queue and run the engine;
- one dispatcher thread owns every response sender and every metric (both crash the server when touched
  from several threads) and finds out about cancellation and deadlines.
"""
