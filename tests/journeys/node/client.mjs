// OpenAI's own package for Node against a Tollgate: prints "ok" when everything was as its users expect.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.TOLLGATE_URL}/v1`, apiKey: process.env.TOLLGATE_API_KEY, maxRetries: 0 });
const model = "chat-mini";
const messages = [{ role: "user", content: "What is Tollgate?" }];
const parameters = {
  type: "object",
  properties: { unit: { enum: ["celsius", "kelvin"] } },
  required: ["unit"],
  additionalProperties: false,
};

const whole = await client.chat.completions.create({ model, messages, max_completion_tokens: 8, n: 2, logprobs: true });
assert.equal(whole.choices.length, 2);
assert.ok(whole.choices[0].logprobs.content.length > 0);
assert.ok(Number(whole.tollgate.settled) > 0);

let text = "";
let usage = null;
const options = { include_usage: true };
const stream = await client.chat.completions.create({ model, messages, max_tokens: 8, stream: true, stream_options: options });
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.ok(text.length > 0);
assert.ok(usage.completion_tokens > 0);

const tools = [{ type: "function", function: { name: "temperature", parameters } }];
const forced = client.chat.completions.stream({ model, messages, tools, tool_choice: "required", max_tokens: 200 });
const called = (await forced.finalChatCompletion()).choices[0];
assert.equal(called.finish_reason, "tool_calls");
assert.ok(["celsius", "kelvin"].includes(JSON.parse(called.message.tool_calls[0].function.arguments).unit));

const first = await client.responses.create({ model, input: "What is Tollgate?", max_output_tokens: 8 });
const second = await client.responses.create({ model, input: "And?", max_output_tokens: 8, previous_response_id: first.id });
assert.ok(second.output_text.length > 0);
assert.equal((await client.responses.retrieve(second.id)).previous_response_id, first.id);
await client.responses.delete(first.id);

await assert.rejects(client.chat.completions.create({ model: "gpt-9", messages }), OpenAI.NotFoundError);
await assert.rejects(client.chat.completions.create({ model, messages: [] }), OpenAI.BadRequestError);
console.log("ok");
