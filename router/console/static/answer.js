// One answer on the page while it streams: text or tokens, thoughts, what it cost, its waterfall.

import { duration, h, say } from "./dom.js";
import { json, phasesOf } from "./api.js";
import { hideTip, tokenElement, walkable } from "./tokens.js";
import { waterfall } from "./waterfall.js";

export class Answer {
  constructor() {
    this.text = "";
    this.id = null;
    this.end = null;
    this.usage = null;
    this.fallback = []; // phases, where the server keeps no requests
    this.began = performance.now();
    this.first = null;
    this.last = null;
    this.body = h("div", { class: "answer running" });
    this.thought = null;
    this.facts = h("div", { class: "facts" });
    this.element = h("div", { class: "message" }, this.body, this.facts);
    walkable(this.body);
  }

  headers(response) {
    this.fallback = phasesOf(response.headers.get("Server-Timing"));
  }

  /** Text as it comes, with its tokens where their probabilities were asked for. */
  add(text, entries) {
    if (!text && !entries?.length) return;
    this.mark();
    this.text += text;
    if (entries?.length) this.body.append(...entries.map(tokenElement));
    else this.body.append(text);
  }

  addThought(text) {
    this.mark();
    if (!this.thought) {
      this.thought = h("pre");
      const box = h("details", { class: "thought", open: true }, h("summary", {}, "Thoughts"), this.thought);
      this.element.prepend(box);
    }
    this.thought.append(text);
  }

  addCall(call) {
    this.mark();
    const { name, arguments: given } = call.function ?? {};
    this.add((name ? `\n${name} ` : "") + (given ?? ""));
  }

  mark() {
    this.last = performance.now();
    this.first ??= this.last;
  }

  /** Nothing more comes: `problem` says why, where it did not end by itself. */
  async finish(problem) {
    this.body.classList.remove("running");
    hideTip();
    while (this.body.textContent.length > this.text.length) this.body.lastChild.remove(); // end tokens
    // Tokens cut inside a character, or a stop string, do not add up to the text, which is the truth.
    if (this.body.textContent !== this.text) this.body.replaceChildren(this.text);
    this.body.querySelector(".token")?.setAttribute("tabindex", "0");
    if (problem) this.element.append(h("p", { class: "error" }, problem));
    this.facts.append(...this.summary().map((fact) => h("span", {}, fact)));
    if (this.id) this.facts.append(this.button());
    say(problem ?? "The answer is complete.");
  }

  summary() {
    const facts = [];
    if (this.end) facts.push(this.end);
    if (this.usage) facts.push(`${this.usage.prompt_tokens} + ${this.usage.completion_tokens} tokens`);
    if (this.first === null) return facts;
    facts.push(`first after ${duration((this.first - this.began) / 1000)}`);
    const rest = (this.usage?.completion_tokens ?? 0) - 1;
    if (rest > 0 && this.last > this.first) {
      facts.push(`${((1000 * rest) / (this.last - this.first)).toFixed(1)} tokens/s`);
    }
    return facts;
  }

  button() {
    const button = h("button", { type: "button", "aria-expanded": "false" }, "Where the time went");
    button.addEventListener("click", async () => {
      button.hidden = true;
      this.element.append(await this.picture());
    });
    return button;
  }

  async picture() {
    try {
      const told = await json(`/debug/requests/${encodeURIComponent(this.id)}`);
      return waterfall(told);
    } catch {
      return waterfall({ choices: [{ index: 0, ttft_s: null, phases: this.fallback, attempts: [] }] });
    }
  }
}
