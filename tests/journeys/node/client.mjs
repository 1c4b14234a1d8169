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

const sampled = await client.chat.completions.create({
  model, messages: [{ role: "developer", content: "Be brief." }, ...messages], max_completion_tokens: 8, temperature: 1, top_p: 0.9,
  seed: 3, stop: ["zzz"], presence_penalty: 1, frequency_penalty: 1, logit_bias: { 5: -100 }, service_tier: "flex", user: "somebody",
});
assert.equal(sampled.service_tier, "flex");

const json_schema = { name: "unit", schema: parameters, strict: true };
const formatted = await client.chat.completions.create({
  model, messages, max_tokens: 200, response_format: { type: "json_schema", json_schema },
});
assert.ok(["celsius", "kelvin"].includes(JSON.parse(formatted.choices[0].message.content).unit));

const kept = await client.chat.completions.create({ model, messages, max_tokens: 4, store: true, metadata: { topic: "node" } });
assert.equal((await client.chat.completions.retrieve(kept.id)).id, kept.id);
assert.ok((await client.chat.completions.list({ metadata: { topic: "node" } })).data.some((one) => one.id === kept.id));
assert.ok((await client.chat.completions.delete(kept.id)).deleted);

const idempotent = { headers: { "Idempotency-Key": `node-${kept.id}` } };
const once = await client.chat.completions.create({ model, messages, max_tokens: 4 }, idempotent);
assert.deepEqual(await client.chat.completions.create({ model, messages, max_tokens: 4 }, idempotent), once);

const bare = await client.completions.create({ model, prompt: "Tollgate is", max_tokens: 4, echo: true });
assert.ok(bare.choices[0].text.startsWith("Tollgate is"));

const input = ["keys", "limits"];
const packed = await client.embeddings.create({ model: "embed-mini", input, dimensions: 8 });
const plain = await client.embeddings.create({ model: "embed-mini", input, dimensions: 8, encoding_format: "float" });
assert.deepEqual(packed.data.map((one) => one.embedding.length), [8, 8]);
assert.ok(Math.abs(packed.data[1].embedding[0] - plain.data[1].embedding[0]) < 1e-6);

const listed = [];
for await (const one of client.models.list()) listed.push(one.id);
assert.ok(listed.includes(model));
assert.equal((await client.models.retrieve(model)).state, "ready");

const types = [];
const typed = await client.responses.create({ model, input: "What is Tollgate?", max_output_tokens: 8, stream: true });
for await (const event of typed) types.push(event.type);
assert.equal(types[0], "response.created");
assert.ok(types.includes("response.output_text.delta"));
assert.ok(["response.completed", "response.incomplete"].includes(types.at(-1)));

const first = await client.responses.create({ model, input: "What is Tollgate?", max_output_tokens: 8 });
const second = await client.responses.create({ model, input: "And?", max_output_tokens: 8, previous_response_id: first.id });
assert.ok(second.output_text.length > 0);
assert.equal((await client.responses.retrieve(second.id)).previous_response_id, first.id);
await client.responses.delete(first.id);

await assert.rejects(client.chat.completions.create({ model: "gpt-9", messages }), OpenAI.NotFoundError);
await assert.rejects(client.chat.completions.create({ model, messages: [] }), OpenAI.BadRequestError);
console.log("ok");
