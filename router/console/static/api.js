// What the page asks of its server, and how streams are read.

let key = sessionStorage.getItem("baton-key") ?? "";

export function useKey(value) {
  key = value;
  sessionStorage.setItem("baton-key", value); // of this tab, forgotten with it
}

export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The response, if it is a good one. Raises Refusal with the server's own words. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) dispatchEvent(new Event("key-wanted"));
  throw new Refusal(response.status, await words(response));
}

export const json = async (path) => (await ask(path)).json();

export const post = (path, body, signal) =>
  ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });

async function words(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text || `${response.status} ${response.statusText}`;
  }
}

/** The JSON events of a stream, until `[DONE]`. Raises Refusal for an error event. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refusal(0, "The stream broke off.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: "));
      const text = data.map((line) => line.slice(6)).join("\n");
      if (text === "[DONE]") return;
      if (!text) continue; // a comment that keeps the connection alive
      const event = JSON.parse(text);
      if (event.error) throw new Refusal(event.error.code, event.error.message);
      yield event;
    }
  }
}

/** Phases of a `Server-Timing` header as spans one after the other, in seconds. */
export function phasesOf(header) {
  const phases = [];
  let start = 0;
  for (const entry of (header ?? "").split(", ")) {
    const [, phase, ms] = /^([a-z-]+);dur=([\d.]+)$/.exec(entry) ?? [];
    if (!phase || phase === "ttft") continue;
    phases.push({ phase, start_s: start, seconds: ms / 1000 });
    start += ms / 1000;
  }
  return phases;
}
