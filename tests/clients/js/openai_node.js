// The `openai` package of node: `node openai_node.js SERVERS`, one line of JSON per case.

import assert from "node:assert/strict";
import OpenAI from "openai";

const servers = JSON.parse(process.argv[2]);
const base = `${servers.open}/v1`;
const api = new OpenAI({ baseURL: base, apiKey: "none", maxRetries: 0 });
const model = servers.model;
const prompt = "def read_lines(path):\n";
const messages = [{ role: "user", content: "Write a function that counts the words in a text." }];
const greedy = { model, temperature: 0, max_tokens: 24 };
const long = { model, temperature: 0, max_tokens: 1500, ignore_eos: true };

async function metric(name, label) {
  const text = await (await fetch(`${servers.open}/metrics`)).text();
  const mine = text.split("\n").filter((line) => line.startsWith(`${name}{`) && line.includes(label));
  return mine.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(" "))), 0);
}

const numAborted = () => metric("vllm:request_success_total", 'finished_reason="abort"');
const numRunning = () => metric("vllm:num_requests_running", "");

async function waitUntil(holds, what) {
  const deadline = Date.now() + 60_000;
  while (!(await holds())) {
    assert(Date.now() < deadline, `still not so: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

async function collect(stream) {
  const texts = {};
  const ended = new Set();
  for await (const chunk of stream) {
    for (const choice of chunk.choices) {
      assert(!ended.has(choice.index), "something follows the end");
      texts[choice.index] = (texts[choice.index] ?? "") + (choice.delta.content ?? "");
      if (choice.finish_reason !== null) ended.add(choice.index);
    }
  }
  assert.equal(ended.size, Object.keys(texts).length);
  return texts;
}

async function errorOf(kind, call) {
  try {
    await call();
  } catch (error) {
    assert(error instanceof kind, `${error?.constructor.name}: ${error?.message}`);
    return error;
  }
  assert.fail(`no ${kind.name}`);
}

const cases = {
  async models() {
    const ids = [];
    for await (const one of api.models.list()) ids.push(one.id);
    assert.deepEqual(ids, [model]);
    assert.equal((await api.models.retrieve(model)).max_model_len, servers.max_model_len);
  },

  async completions_streamed_or_not() {
    const whole = await api.completions.create({ ...greedy, prompt });
    let text = "";
    for await (const chunk of await api.completions.create({ ...greedy, prompt, stream: true })) {
      text += chunk.choices[0].text;
    }
    assert(text);
    assert.equal(text, whole.choices[0].text);
  },

  async chat_streamed_or_not() {
    const whole = await api.chat.completions.create({ ...greedy, messages });
    const stream = await api.chat.completions.create({ ...greedy, messages, stream: true });
    assert.deepEqual(await collect(stream), { 0: whole.choices[0].message.content });
  },

  async the_stream_helper() {
    const whole = await api.chat.completions.create({ ...greedy, messages });
    const helper = api.chat.completions.stream({ ...greedy, messages });
    let text = "";
    helper.on("content", (delta) => (text += delta));
    const final = await helper.finalChatCompletion();
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(final.choices[0].message.content, text);
  },

  async several_choices() {
    const ask = { model, messages, max_tokens: 12, n: 2, seed: 5 };
    const whole = await api.chat.completions.create(ask);
    const told = Object.fromEntries(whole.choices.map((c) => [c.index, c.message.content]));
    assert.notEqual(told[0], told[1]);
    assert.deepEqual(await collect(await api.chat.completions.create({ ...ask, stream: true })), told);
  },

  async logprobs() {
    const ask = { ...greedy, messages, logprobs: true, top_logprobs: 2 };
    const { message, logprobs } = (await api.chat.completions.create(ask)).choices[0];
    assert(logprobs.content.every((entry) => entry.top_logprobs.length === 2));
    const shown = Buffer.from(logprobs.content.flatMap((entry) => entry.bytes)).toString();
    assert(shown.startsWith(message.content));
  },

  async stop_strings() {
    const text = (await api.completions.create({ ...greedy, prompt })).choices[0].text;
    const stop = text.slice(Math.floor(text.length / 2)).slice(0, 4);
    const { text: cut, finish_reason } = (await api.completions.create({ ...greedy, prompt, stop }))
      .choices[0];
    assert.equal(cut, text.slice(0, text.indexOf(stop)));
    assert.equal(finish_reason, "stop");
  },

  async usage_in_streams() {
    const whole = await api.chat.completions.create({ ...greedy, messages });
    const chunks = [];
    const ask = { ...greedy, messages, stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await api.chat.completions.create(ask)) chunks.push(chunk);
    const last = chunks.pop();
    assert.deepEqual(last.choices, []);
    assert.equal(last.usage.completion_tokens, whole.usage.completion_tokens);
    assert(chunks.every((chunk) => chunk.usage === null && chunk.choices.length > 0));
  },

  async errors_in_requests() {
    for (const stream of [false, true]) {
      const create = (more) => () => api.chat.completions.create({ model, messages, stream, ...more });
      let error = await errorOf(OpenAI.NotFoundError, create({ model: "other" }));
      assert.deepEqual([error.status, error.code], [404, "model_not_found"]);
      error = await errorOf(OpenAI.BadRequestError, create({ temperature: 3 }));
      assert.deepEqual([error.param, error.type], ["temperature", "invalid_request_error"]);
      error = await errorOf(OpenAI.BadRequestError, create({ max_tokens: 1_000_000 }));
      assert.equal(error.code, "context_length_exceeded");
    }
  },

  async keys_and_limits() {
    const baseURL = `${servers.guarded}/v1`;
    const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
    const refused = await errorOf(OpenAI.AuthenticationError, () => stranger.models.list());
    assert.equal(refused.code, "invalid_api_key");
    const known = new OpenAI({ baseURL, apiKey: servers.key, maxRetries: 0 });
    const ask = { model, prompt, max_tokens: 2 };
    await known.completions.create(ask);
    const error = await errorOf(OpenAI.RateLimitError, () => known.completions.create(ask));
    assert(Number(error.headers.get("retry-after")) > 0);
  },

  async a_stream_that_is_aborted() {
    const before = await numAborted();
    const stream = await api.chat.completions.create({ ...long, messages, stream: true });
    for await (const chunk of stream) {
      assert(chunk.id);
      break; // which aborts the request
    }
    await waitUntil(async () => (await numAborted()) === before + 1, "the request has ended");
    assert.equal(await numRunning(), 0);
  },

  async a_call_that_is_aborted() {
    const before = await numAborted();
    const controller = new AbortController();
    const call = api.completions.create({ ...long, prompt }, { signal: controller.signal });
    const refused = errorOf(OpenAI.APIUserAbortError, () => call);
    await waitUntil(async () => (await numRunning()) === 1, "it runs");
    controller.abort();
    await refused;
    await waitUntil(async () => (await numAborted()) === before + 1, "the request has ended");
  },

  async many_at_once() {
    const ask = async (number) => {
      const content = `Write function number ${number}.`;
      const question = { ...greedy, messages: [{ role: "user", content }], stream: true };
      return (await collect(await api.chat.completions.create(question)))[0];
    };
    const numbers = [0, 1, 2, 3, 4, 5];
    const alone = [];
    for (const number of numbers) alone.push(await ask(number));
    assert.deepEqual(await Promise.all(numbers.map(ask)), alone);
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
