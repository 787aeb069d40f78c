// The AI SDK by `@ai-sdk/openai-compatible`: `node ai_sdk.js SERVERS`, one line of JSON per case.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, streamText, tool } from "ai";
import { z } from "zod";

const servers = JSON.parse(process.argv[2]);
const provider = (more) =>
  createOpenAICompatible({
    name: "baton",
    baseURL: `${servers.open}/v1`,
    apiKey: "none",
    includeUsage: true,
    supportsStructuredOutputs: true,
    ...more,
  });
const model = provider().chatModel(servers.model);
const prompt = "Write a function that counts the words in a text.";
const greedy = { model, prompt, temperature: 0, maxOutputTokens: 200, maxRetries: 0 };
const person = z.object({ is_tall: z.boolean(), kind: z.enum(["child", "grown"]) });
const weather = tool({
  description: "Tells the weather",
  inputSchema: z.object({ city: z.enum(["Oslo", "Rome"]), metric: z.boolean() }),
});

const cases = {
  async text_streamed_or_not() {
    const ask = { ...greedy, maxOutputTokens: 24 };
    const whole = await generateText(ask);
    const stream = streamText(ask);
    let text = "";
    for await (const delta of stream.textStream) text += delta;
    assert(text);
    assert.equal(text, whole.text);
    assert.equal(await stream.finishReason, whole.finishReason);
    assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
  },

  async a_required_tool_call() {
    const ask = { ...greedy, tools: { weather }, toolChoice: "required" };
    const whole = await generateText(ask);
    assert(whole.toolCalls.length > 0);
    for (const call of whole.toolCalls) {
      assert.equal(call.toolName, "weather");
      assert(["Oslo", "Rome"].includes(call.input.city));
    }
    const streamed = await streamText(ask).toolCalls;
    assert.deepEqual(streamed.map((call) => call.input), whole.toolCalls.map((call) => call.input));
  },

  async an_object() {
    const ask = { ...greedy, output: Output.object({ schema: person }) };
    const whole = (await generateText(ask)).output;
    assert(person.safeParse(whole).success);
    const stream = streamText(ask);
    let last;
    for await (const partial of stream.partialOutputStream) last = partial;
    assert.deepEqual(last, whole);
  },

  async errors() {
    const stranger = provider({ baseURL: `${servers.guarded}/v1`, apiKey: "wrong" });
    for (const [status, more] of [
      [404, { model: provider().chatModel("other") }],
      [400, { temperature: 7 }],
      [401, { model: stranger.chatModel(servers.model) }],
    ]) {
      await assert.rejects(generateText({ ...greedy, ...more }), (error) => {
        assert(APICallError.isInstance(error), String(error));
        return error.statusCode === status;
      });
    }
  },
};

for (const [name, run] of Object.entries(cases)) {
  let error = null;
  try {
    await run();
  } catch (thrown) {
    error = String(thrown?.stack ?? thrown);
  }
  console.log(JSON.stringify({ case: name, error }));
}
