// The fleet live: one card per node, with its KV use over the last two minutes.

import { json } from "./api.js";
import { $, duration, h, svg } from "./dom.js";

const KEPT = 120; // samples of a node's history
const past = new Map(); // node id → shares of KV in use

export async function refreshFleet() {
  const told = await json("/debug/fleet");
  const ids = new Set(told.nodes.map(({ id }) => id));
  for (const id of past.keys()) if (!ids.has(id)) past.delete(id);
  $("fleet-summary").replaceChildren(...summary(told).map((fact) => h("span", {}, fact)));
  const none = h("p", { class: "empty" }, "No node has registered so far.");
  $("nodes").replaceChildren(...(told.nodes.length ? told.nodes.map(card) : [none]));
}

function summary(told) {
  const facts = [`${told.running} requests on nodes`, `${told.waiting} waiting`];
  if (told.model) facts.unshift(told.model, `context ${told.max_model_len}`);
  if (told.tuner?.decision) facts.push(`tuner (${told.tuner.mode}): ${told.tuner.decision}`);
  if (told.open_pairs) facts.push(`${told.open_pairs} pairs avoided after failed handoffs`);
  return facts;
}

function card(node) {
  const { load } = node;
  const used = load.blocks_total ? 1 - load.blocks_free / load.blocks_total : 0;
  const history = past.get(node.id) ?? [];
  past.set(node.id, [...history, used].slice(-KEPT));
  const facts = {
    "KV in use": `${(100 * used).toFixed(1)} %`,
    blocks: `${load.blocks_total - load.blocks_free} of ${load.blocks_total}`,
    running: load.num_running,
    waiting: load.num_waiting,
    "tokens queued": load.queued_tokens,
    steps: load.step,
    "hands over by": node.transports.join(", ") || "–",
    heard: `${duration(node.heard_s)} ago`,
  };
  return h(
    "article",
    { class: "node" },
    h("h3", {}, node.name, h("span", { class: "role" }, node.role),
      h("span", { class: node.state === "serving" ? "state" : "state other" }, node.state)),
    meter(used),
    picture(past.get(node.id)),
    h("dl", {}, ...Object.entries(facts).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))])),
  );
}

function meter(used) {
  const bar = h("span");
  bar.style.width = `${100 * used}%`;
  return h("div", { class: "track", role: "meter", "aria-label": "KV in use", "aria-valuemin": "0",
    "aria-valuemax": "100", "aria-valuenow": (100 * used).toFixed(1) }, bar);
}

function picture(shares) {
  const x = (index) => index + KEPT - shares.length;
  const line = shares.map((share, index) => `L${x(index)} ${(1 - share) * 40}`).join("");
  const path = svg("path", { d: `M${x(0)} 40${line}L${KEPT - 1} 40Z` });
  return svg("svg", { viewBox: `0 -1 ${KEPT - 1} 42`, preserveAspectRatio: "none", "aria-hidden": "true" }, path);
}
