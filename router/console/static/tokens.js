// Tokens with what else the model considered: in a tip at the pointer, or by arrow keys.

import { $, h } from "./dom.js";

const shown = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;

/** A token's element; `entry` is {token, logprob, top: [{token, logprob}, …]}. */
export function tokenElement(entry) {
  const element = h("span", { class: "token", tabindex: "-1" }, entry.token);
  element.style.setProperty("--doubt", String(1 - Math.exp(entry.logprob)));
  element.addEventListener("pointerenter", () => showTip(element, entry));
  element.addEventListener("focus", () => showTip(element, entry));
  element.addEventListener("pointerleave", hideTip);
  element.addEventListener("blur", hideTip);
  return element;
}

/** Lets the arrow keys walk over the tokens in `container`, which is one stop for Tab. */
export function walkable(container) {
  container.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !event.target.classList.contains("token")) return;
    event.preventDefault();
    const tokens = [...container.querySelectorAll(".token")];
    tokens[tokens.indexOf(event.target) + step]?.focus();
  });
}

function showTip(element, entry) {
  const tip = $("tip");
  const rows = entry.top.some((other) => other.token === entry.token)
    ? entry.top
    : [{ token: entry.token, logprob: entry.logprob }, ...entry.top];
  tip.replaceChildren(h("table", {}, h("tbody", {}, ...rows.map((row) => tipRow(row, entry.token)))));
  tip.hidden = false;
  element.setAttribute("aria-describedby", "tip");
  place(tip, element.getClientRects()[0] ?? element.getBoundingClientRect());
}

function tipRow({ token, logprob }, chosen) {
  const bar = h("span");
  bar.style.width = percent(logprob).replace(" ", "");
  return h(
    "tr",
    { class: token === chosen && "chosen" },
    h("td", {}, h("code", {}, shown(token))),
    h("td", { class: "num" }, percent(logprob)),
    h("td", { class: "meter" }, bar),
  );
}

function place(tip, at) {
  const width = tip.offsetWidth;
  const below = at.bottom + tip.offsetHeight + 12 < innerHeight;
  tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - width - 4))}px`;
  tip.style.top = `${below ? at.bottom + 6 : at.top - tip.offsetHeight - 6}px`;
}

export function hideTip() {
  $("tip").hidden = true;
}
