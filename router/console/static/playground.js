// Chat and completion: what is asked, the stream into an Answer, and stopping it.

import { events, json, post } from "./api.js";
import { Answer } from "./answer.js";
import { $, h, say } from "./dom.js";

const NUMBERS = ["temperature", "max_tokens", "top_p", "top_k", "min_p", "seed",
  "frequency_penalty", "presence_penalty", "repetition_penalty"];
const NUM_ALTERNATIVES = 5;
const field = (name) => document.querySelector(`#parameters [name="${name}"]`);

let conversation = []; // messages as the API wants them
let running = null; // the AbortController of the answer that streams

// ---------------------------------------------------------------- what is asked

/** The parameters that differ from the server's own defaults. Raises Error where one is wrong. */
function parameters(kind) {
  const body = { model: $("model").value, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) {
    if (!field(name).checkValidity()) throw new Error(`${name}: ${field(name).validationMessage}`);
    if (field(name).value !== "") body[name] = Number(field(name).value);
  }
  const stops = field("stop").value.split("\n").filter((line) => line !== "");
  if (stops.length) body.stop = stops;
  const schema = field("schema").value.trim();
  if (schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: parsed(schema) } };
  if (field("probabilities").checked) Object.assign(body, kind.probabilities);
  return body;
}

function parsed(schema) {
  try {
    return JSON.parse(schema);
  } catch (error) {
    throw new Error(`The JSON schema is not JSON: ${error.message}`);
  }
}

const CHAT = {
  path: "/v1/chat/completions",
  probabilities: { logprobs: true, top_logprobs: NUM_ALTERNATIVES },
  body: () => {
    const system = field("system").value.trim();
    const first = system ? [{ role: "system", content: system }] : [];
    return { messages: [...first, ...conversation], ...parameters(CHAT) };
  },
  take(answer, choice) {
    const { content, reasoning_content: thought, tool_calls: calls } = choice.delta;
    const entries = choice.logprobs?.content?.map(({ token, logprob, top_logprobs: top }) => ({ token, logprob, top }));
    if (thought) answer.addThought(thought);
    else answer.add(content ?? "", entries);
    calls?.forEach((call) => answer.addCall(call));
  },
};

const COMPLETION = {
  path: "/v1/completions",
  probabilities: { logprobs: NUM_ALTERNATIVES },
  body: () => ({ prompt: $("completion-input").value, ...parameters(COMPLETION) }),
  take(answer, choice) {
    const told = choice.logprobs;
    const entries = told?.tokens.map((token, index) => ({
      token,
      logprob: told.token_logprobs[index],
      top: Object.entries(told.top_logprobs?.[index] ?? {}).map(([token, logprob]) => ({ token, logprob })),
    }));
    answer.add(choice.text, entries);
  },
};

// ---------------------------------------------------------------- the stream

async function stream(kind, body, answer) {
  running = new AbortController();
  setRunning(true);
  let problem = null;
  try {
    const response = await post(kind.path, body, running.signal);
    answer.headers(response);
    for await (const event of events(response)) {
      answer.id = event.id;
      answer.usage = event.usage ?? answer.usage;
      for (const choice of event.choices) {
        kind.take(answer, choice);
        answer.end = choice.finish_reason ?? answer.end;
      }
      keepInView(answer.element);
    }
  } catch (error) {
    problem = error.name === "AbortError" ? "Stopped." : error.message;
  }
  running = null;
  setRunning(false);
  await answer.finish(problem);
  keepInView(answer.element);
}

function setRunning(is) {
  for (const kind of ["chat", "completion"]) {
    $(`${kind}-send`).disabled = is;
    $(`${kind}-stop`).hidden = !is;
  }
  if (is) say("The answer begins.");
}

/** Follows the text, unless somebody has scrolled up to read. */
function keepInView(element) {
  const box = element.parentElement;
  if (box && box.scrollHeight - box.scrollTop - box.clientHeight < 160) box.scrollTop = box.scrollHeight;
}

function show(error) {
  const place = document.querySelector("#chat:not([hidden]) .messages") ?? $("completion-output");
  place.append(h("p", { class: "error" }, error.message));
}

async function sendChat() {
  const text = $("chat-input").value.trim();
  if (!text || running) return;
  conversation.push({ role: "user", content: text });
  let body;
  try {
    body = CHAT.body();
  } catch (error) {
    conversation.pop();
    return show(error);
  }
  $("chat-input").value = "";
  document.querySelector("#messages .empty")?.remove();
  const answer = new Answer();
  $("messages").append(h("div", { class: "message user" }, text), answer.element);
  $("messages").scrollTop = $("messages").scrollHeight;
  await stream(CHAT, body, answer);
  if (answer.text) conversation.push({ role: "assistant", content: answer.text });
  else conversation.pop(); // so that roles go on taking turns
}

async function sendCompletion() {
  if (running || !$("completion-input").value) return;
  let body;
  try {
    body = COMPLETION.body();
  } catch (error) {
    return show(error);
  }
  const answer = new Answer();
  $("completion-output").replaceChildren(answer.element);
  $("completion-adopt").hidden = true;
  await stream(COMPLETION, body, answer);
  $("completion-adopt").hidden = !answer.text;
  $("completion-adopt").onclick = () => {
    $("completion-input").value += answer.text;
    $("completion-adopt").hidden = true;
  };
}

function newChat() {
  running?.abort();
  conversation = [];
  $("messages").replaceChildren(h("p", { class: "empty" }, "Ask something."));
  $("chat-input").focus();
}

// ---------------------------------------------------------------- the page

async function copyCurl(button) {
  const kind = $("completion").hidden ? CHAT : COMPLETION;
  const quoted = JSON.stringify(kind.body(), null, 2).replaceAll("'", "'\\''");
  const command = `curl -N ${location.origin}${kind.path} \\\n  -H 'Content-Type: application/json' \\\n  -d '${quoted}'`;
  await navigator.clipboard.writeText(command);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy as curl"), 1500);
}

export async function loadModels() {
  const { data } = await json("/v1/models");
  $("model").replaceChildren(...data.map(({ id }) => h("option", {}, id)));
}

export function startPlayground() {
  const sends = { chat: sendChat, completion: sendCompletion };
  for (const [kind, send] of Object.entries(sends)) {
    $(`${kind}-form`).addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    $(`${kind}-stop`).addEventListener("click", () => running?.abort());
    $(`${kind}-input`).addEventListener("keydown", (event) => {
      const sends = kind === "chat" ? !event.shiftKey : event.ctrlKey || event.metaKey;
      if (event.key !== "Enter" || !sends || event.isComposing) return;
      event.preventDefault();
      send();
    });
  }
  addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  $("chat-clear").addEventListener("click", newChat);
  $("copy-curl").addEventListener("click", (event) => copyCurl(event.target).catch(show));
}
