// A request's phases as bars. What comes after the first token has a scale of its own: a long answer
// would else leave the first token no room.

import { bytes, duration, h } from "./dom.js";

export function waterfall(told) {
  const box = h("div");
  for (const choice of told.choices) {
    if (told.choices.length > 1) box.append(h("h3", {}, `choice ${choice.index}`));
    box.append(bars(choice), attempts(choice));
  }
  return box;
}

function bars(choice) {
  const grid = h("div", { class: "waterfall" });
  const isAfter = ({ start_s }) => choice.ttft_s !== null && start_s >= choice.ttft_s;
  const before = choice.phases.filter((phase) => !isAfter(phase));
  const after = choice.phases.filter(isAfter);
  section(grid, "To the first token", before, false);
  section(grid, "After it", after, true);
  return grid;
}

function section(grid, title, phases, late) {
  if (!phases.length) return;
  const start = phases[0].start_s;
  const total = phases.at(-1).start_s + phases.at(-1).seconds - start;
  grid.append(h("h4", {}, `${title}: ${duration(total)}`));
  for (const phase of phases) {
    const bar = h("span", { class: late && "late" });
    bar.style.left = `${(100 * (phase.start_s - start)) / (total || 1)}%`;
    bar.style.width = `${(100 * phase.seconds) / (total || 1)}%`;
    grid.append(
      h("span", {}, phase.phase),
      h("span", { class: "num" }, duration(phase.seconds)),
      h("span", { class: "track", "aria-hidden": "true" }, bar),
    );
  }
}

function attempts(choice) {
  const list = h("ol", { class: "attempts" });
  for (const attempt of choice.attempts) {
    const decode = attempt.decode && attempt.decode !== attempt.prefill ? `→ ${attempt.decode}` : "answers alone";
    const facts = [`${attempt.prefill} ${decode}`, attempt.cause ?? "running"];
    if (attempt.cached_tokens) facts.push(`${attempt.cached_tokens} cached tokens`);
    const sent = attempt.transfer;
    if (sent?.num_bytes) facts.push(`${bytes(sent.num_bytes)} by ${sent.transport} in ${duration(sent.seconds)}`);
    list.append(h("li", {}, facts.join(", ")));
  }
  return list;
}
