// The page: its views, the theme, the key, and what is asked again while somebody looks.

import { useKey } from "./api.js";
import { $ } from "./dom.js";
import { refreshFleet } from "./fleet.js";
import { loadModels, startPlayground } from "./playground.js";
import { refreshRequests } from "./requests.js";

const VIEWS = ["chat", "completion", "requests", "fleet"];
const LIVE = { requests: refreshRequests, fleet: refreshFleet };
const SECOND = 1000;
let view = null;

function open(name, focus = false) {
  view = VIEWS.includes(name) ? name : "chat";
  for (const other of VIEWS) {
    const tab = $(`tab-${other}`);
    tab.setAttribute("aria-selected", String(other === view));
    tab.tabIndex = other === view ? 0 : -1;
    $(other).hidden = other !== view;
  }
  $("parameters").hidden = !["chat", "completion"].includes(view);
  document.querySelector('[data-only="chat"]').hidden = view !== "chat";
  if (location.hash !== `#${view}`) history.replaceState(null, "", `#${view}`);
  if (focus) $(`tab-${view}`).focus();
  refresh();
}

function startTabs() {
  for (const name of VIEWS) $(`tab-${name}`).addEventListener("click", () => open(name));
  document.querySelector(".tabs").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    open(VIEWS.at((VIEWS.indexOf(view) + step) % VIEWS.length), true);
  });
  addEventListener("hashchange", () => open(location.hash.slice(1)));
}

function startTheme() {
  const root = document.documentElement;
  const stored = localStorage.getItem("baton-theme");
  if (stored) root.dataset.theme = stored;
  $("theme").addEventListener("click", () => {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("baton-theme", root.dataset.theme);
  });
}

function startKey() {
  addEventListener("key-wanted", () => ($("key-form").hidden = false));
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey($("key").value);
    $("key-form").hidden = true;
    refresh();
  });
}

function tell(problem) {
  $("notice").hidden = !problem;
  $("notice").textContent = problem ?? "";
}

async function isReady() {
  const response = await fetch("/ready"); // 503 has a body too
  const told = await response.json();
  $("ready").className = told.ready ? "good" : "";
  $("ready").textContent = told.ready
    ? ["prefill", "decode", "mixed"].map((role) => [told[`${role}_nodes`], role]).filter(([count]) => count).map((kind) => kind.join(" ")).join(", ")
    : "waiting for nodes";
  return told.ready;
}

async function refresh() {
  if (document.hidden) return;
  try {
    const ready = await isReady();
    if (ready && !$("model").options.length) await loadModels();
    await LIVE[view]?.();
    tell(null);
  } catch (error) {
    if (error.status === 401) return tell(null); // the form says it
    if (error.status === 404) return tell("This server does not tell about requests and nodes here: it does so on loopback, or with API keys.");
    $("ready").className = error.status ? "good" : "bad";
    if (!error.status) $("ready").textContent = "no connection";
    tell(error.message);
  }
}

async function refreshForEver() {
  for (;;) {
    await refresh();
    await new Promise((resolve) => setTimeout(resolve, SECOND));
  }
}

$("parameters").open = matchMedia("(min-width: 52rem)").matches;
startTheme();
startTabs();
startKey();
startPlayground();
open(location.hash.slice(1));
$("chat-input").focus();
refreshForEver();
