// The requests that the router remembers, and one of them in detail.

import { json } from "./api.js";
import { $, duration, h } from "./dom.js";
import { waterfall } from "./waterfall.js";

let chosen = null;

export async function refreshRequests() {
  const { requests } = await json("/debug/requests");
  const rows = requests.slice(0, 200).map(row);
  const none = h("tr", {}, h("td", { colspan: "4", class: "empty" }, "No request so far."));
  $("request-list").tBodies[0].replaceChildren(...(rows.length ? rows : [none]));
  if (requests.some(({ id, state }) => id === chosen && state === "running")) await showDetail();
}

function row(told) {
  const words = told.ends.map((end, index) => end ?? told.open_phases[index]);
  const choose = () => {
    chosen = told.id;
    for (const other of $("request-list").tBodies[0].rows) other.removeAttribute("aria-current");
    line.setAttribute("aria-current", "true");
    showDetail();
  };
  const line = h(
    "tr",
    { "aria-current": told.id === chosen && "true" },
    h("td", {}, h("button", { type: "button", onclick: choose }, told.id)),
    h("td", {}, [...new Set(words)].join(", ")),
    h("td", { class: "num" }, duration(told.ttft_s)),
    h("td", { class: "num" }, duration(told.age_s)),
  );
  return line;
}

async function showDetail() {
  const told = await json(`/debug/requests/${encodeURIComponent(chosen)}`);
  const tokens = told.choices.map((choice) => `${choice.prompt_tokens} + ${choice.output_tokens}`);
  $("request-detail").replaceChildren(
    h("h2", { class: "code" }, told.id),
    h("p", { class: "soft" }, `${told.model}, ${told.stream ? "stream" : "one answer"}, ${tokens.join("; ")} tokens, `,
      `arrived ${new Date(1000 * told.arrived_at).toLocaleTimeString()}`),
    waterfall(told),
  );
}
