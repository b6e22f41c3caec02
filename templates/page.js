// Keeps the page alive: the service sends what /status.json tells, once a second.
import { FORMATS } from "./format.js";
import { draw } from "./charts.js";

const $ = (id) => document.getElementById(id);
const SILENT_MS = 5000; // nothing for so long: the connection is dead, whatever the browser thinks

let status = null; // the last one
let stream = null;
let heardAt = Date.now();
let lostAt = null;
let loading = null; // what the books said when Load now was pressed

// --- fill the page ---

function at(context, path) {
  if (path[0] === "^") return at(status, path.slice(1));
  for (const each of path.split("|")) {
    const value = each.split(".").reduce((found, key) => found?.[key], context);
    if (value !== null && value !== undefined) return value;
  }
  return null;
}

const empty = (value) => !value || value.length === 0;

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Set every value beneath an element; `data-*` says which, see templates/macros.html.
function fill(element, context) {
  const d = element.dataset;
  if (d.v) return setText(element, FORMATS[d.f ?? "text"](at(context, d.v)));
  if (d.state) element.dataset.is = String(at(context, d.state) ?? 0);
  if (d.if) element.hidden = empty(at(context, d.if));
  if (d.unless) element.hidden = !empty(at(context, d.unless));
  if (d.with) context = at(context, d.with);
  if (d.draw || d.chart) return; // not part of each second's news: see drawPictures, showRefusals
  if (d.each) return fillRows(element, at(context, d.each) ?? []);
  for (const child of element.children) fill(child, context);
}

// One row for each entry, made of the template that lies beside them.
function fillRows(box, entries) {
  const template = box.querySelector(":scope > template");
  const items = Array.isArray(entries)
    ? entries.map((item) => (typeof item === "string" ? { name: item } : item))
    : Object.entries(entries).map(([name, item]) => ({ ...item, name }));
  const rows = [...box.querySelectorAll(":scope > [data-row]")];
  while (rows.length > items.length) rows.pop().remove();
  while (rows.length < items.length) {
    box.append(template.content.cloneNode(true));
    rows.push(box.lastElementChild);
  }
  items.forEach((item, i) => fill(rows[i], item));
  return rows;
}

function drawPictures(history) {
  draw(document.querySelector("[data-draw=total]"), "all lanes", history.total, history);
  const rows = fillRows(document.querySelector("[data-draw=each]"), history.lanes);
  Object.entries(history.lanes).forEach(([name, series], i) => draw(rows[i], name, series, history));
}

// --- what came in ---

function show(news) {
  const before = status;
  status = news;
  if (news.version !== document.querySelector("header").dataset.version) return location.reload();
  fill(document.body, news);
  if (news.history) drawPictures(news.history);
  setText($("link"), "live");
  document.body.classList.remove("stale");
  announce(before, news);
  if (loading) showProgress();
  if (sum(before?.rejected) !== sum(news.rejected)) showRefusals();
}

const sum = (counts) => Object.values(counts ?? {}).reduce((total, count) => total + count, 0);

// For ears: a word when the state changes, not one a second.
function announce(before, news) {
  const state = news.summary.state;
  if (lostAt || (before && before.summary.state !== state)) setText($("announcer"), news.summary.text);
  lostAt = null;
  document.title = `datapipe: ${state.replaceAll("_", " ")}`;
}

async function showRefusals() {
  if (!$("refusals")) return; // not for this reader
  const answer = await fetch("refused").catch(() => null);
  if (!answer?.ok) return;
  const { refused } = await answer.json();
  fillRows($("refusals").querySelector("tbody"), refused);
  $("refusals").hidden = refused.length === 0;
  $("no-refusals").hidden = refused.length > 0;
}

// --- Load now ---

async function loadNow(event) {
  event.preventDefault();
  const button = event.target.querySelector("button");
  if (loading) return;
  loading = { ...(status?.books ?? { waiting: 0, loaded: 0 }) };
  button.setAttribute("aria-disabled", "true");
  setText($("load-result"), "Loading\u2026");
  $("load-progress").hidden = false;
  showProgress();
  const text = await askToLoad();
  loading = null;
  $("load-progress").hidden = true;
  button.removeAttribute("aria-disabled");
  setText($("load-result"), text);
}

function showProgress() {
  const gone = status ? status.books.loaded - loading.loaded : 0;
  $("load-progress").max = Math.max(1, loading.waiting);
  $("load-progress").value = gone;
}

async function askToLoad() {
  try {
    const answer = await fetch("load", { method: "POST", headers: { Accept: "application/json" } });
    const told = await answer.json();
    if (!answer.ok) return `Not done: ${told.status_message}`;
    const rows = Object.entries(told.loaded).map(([lane, count]) => `${lane} ${FORMATS.count(count)}`);
    const failed = Object.entries(told.failed).map(([lane, why]) => `${lane}: ${why}`);
    const parts = rows.length ? [`Loaded rows: ${rows.join(", ")}.`] : [];
    if (failed.length) parts.push(`Not loaded: ${failed.join("; ")}`);
    return parts.join(" ") || "Nothing was waiting.";
  } catch {
    return "The service went away meanwhile: see the books once it is back.";
  }
}

// --- the connection ---

function listen() {
  stream?.close();
  heardAt = Date.now();
  stream = new EventSource("stream");
  stream.onmessage = (event) => {
    heardAt = Date.now();
    show(JSON.parse(event.data));
  };
  stream.onerror = lost;
}

function lost() {
  lostAt ??= new Date();
  const since = lostAt.toISOString().slice(11, 19);
  setText($("link"), "no connection");
  document.body.classList.add("stale");
  document.querySelector(".summary").dataset.is = "unreachable";
  const text = `No connection to datapipe since ${since} UTC. What you see is from then; this page asks again by itself.`;
  setText($("sentence").firstElementChild, text);
  setText($("announcer"), "No connection to datapipe.");
}

// The browser asks again by itself, but not after an answer other than 200, and it does not
// notice a connection that died without a word. A page that nobody sees needs no stream.
setInterval(() => {
  if (document.hidden) return;
  if (stream?.readyState === EventSource.CLOSED) return listen();
  if (Date.now() - heardAt > SILENT_MS) {
    lost();
    listen();
  }
}, 1000);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) stream?.close();
  else listen();
});
$("load")?.addEventListener("submit", loadNow);
listen();
