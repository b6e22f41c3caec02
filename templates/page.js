// Keeps the page alive: the service sends each section that has changed, as HTML, once a second.

const $ = (id) => document.getElementById(id);
const TYPES_NAMED = 5;
const TYPING_MS = 120;
const SILENT_MS = 5000; // nothing for so long: the connection is dead, whatever the browser thinks

let stream = null;
let heardAt = Date.now();
let lost = false;
let asked = null; // what the reader wants to see: a row's id, or "" for what was searched for
let loading = null; // how much was waiting and loaded when Load now was pressed

// --- what came in ---

function show(sections) {
  const before = $("summary").dataset.is;
  const focused = document.activeElement;
  for (const [id, html] of Object.entries(sections)) {
    const fresh = document.createElement("template");
    fresh.innerHTML = html;
    if ($(id)) morph($(id), fresh.content.firstElementChild);
  }
  if ($("uptime").dataset.version !== version) return location.reload();
  // a row that was moved has lost it
  if (focused?.isConnected && focused !== document.activeElement) focused.focus({ preventScroll: true });
  $("link").textContent = "live";
  document.body.classList.remove("stale");
  announce(before, $("summary").dataset.is);
  if (loading) showProgress();
  if (sections.pictures) drawnAt = Date.now();
  drawCharts();
  if (asked !== null) answer();
}

// Make an element like another one and touch only what differs: so focus, selection and scrolling
// stay. Children that have an id are the same as long as that is. Attributes that only the page has
// are its script's own.
function morph(old, fresh) {
  if (old.nodeName !== fresh.nodeName) return old.replaceWith(fresh);
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  const known = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  const wanted = [...fresh.childNodes];
  wanted.forEach((child, i) => {
    const there = old.childNodes[i];
    const same = child.id ? known.get(child.id) : there?.id ? null : there;
    if (!same) return old.insertBefore(child, there ?? null);
    if (same !== there) old.insertBefore(same, there ?? null);
    morph(same, child);
  });
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}

// For ears: a word when the state changes, not one a second.
function announce(before, state) {
  if (lost || before !== state) $("announcer").textContent = $("sentence").textContent;
  lost = false;
  document.title = `datapipe: ${state.replaceAll("_", " ")}`;
}

// --- charts ---

let drawnAt = Date.now();

function drawCharts() {
  for (const plot of document.querySelectorAll(".plot")) {
    if (!plot.hasAttribute("role")) handle(plot);
    point(plot, plot.back ?? null);
  }
}

// Show the values `back` steps before now; with null the latest, as the service wrote it.
function point(plot, back) {
  const svg = plot.querySelector("svg");
  const { width, height } = svg.viewBox.baseVal;
  const chart = plot.closest(".chart");
  const readout = chart.querySelector(".readout");
  const at = width - (back ?? 0);
  plot.back = back;
  chart.classList.toggle("pointed", back !== null);
  svg.querySelector(".cursor").setAttribute("d", back === null ? "" : `M${at} 0V${height}`);
  const seconds = plot.dataset.step * (back ?? 0);
  const when = new Date(drawnAt - seconds * 1000).toISOString().slice(11, 19);
  const values = [...svg.querySelectorAll("g path")].reverse().map((path) => {
    const value = path.getAttribute("d").match(`[L ]${at} ([\\d.e+]+)`)?.[1];
    return value && `${Number(value).toLocaleString("en-US")} ${path.classList[0]}${plot.dataset.unit}`;
  });
  const text = back === null ? readout.dataset.now : values[0] ? values.join(", ") : "not known";
  readout.textContent = back === null ? text : `${when}: ${text}`;
  plot.setAttribute("aria-valuenow", String(-(back ?? 0)));
  plot.setAttribute("aria-valuetext", `${when} UTC, ${text}`);
}

// Hover, touch and arrow keys move along the time; to a screen reader it is a slider over it.
function handle(plot) {
  const svg = plot.querySelector("svg");
  const last = svg.viewBox.baseVal.width;
  const label = svg.getAttribute("aria-label");
  const attributes = { role: "slider", tabindex: 0, "aria-label": label, "aria-valuemin": -last, "aria-valuemax": 0 };
  for (const [key, value] of Object.entries(attributes)) plot.setAttribute(key, value);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (box.right - event.clientX) / box.width));
    point(plot, Math.round(share * last));
  });
  for (const away of ["pointerleave", "blur"]) plot.addEventListener(away, () => point(plot, null));
  const steps = { ArrowLeft: 1, ArrowDown: 1, ArrowRight: -1, ArrowUp: -1, PageUp: -12, PageDown: 12, Home: last, End: -last };
  plot.addEventListener("keydown", (event) => {
    if (!(event.key in steps)) return;
    event.preventDefault();
    point(plot, Math.min(last, Math.max(0, (plot.back ?? 0) + steps[event.key])));
  });
}

// --- Load now ---

async function loadNow(event) {
  event.preventDefault();
  if (loading) return;
  const button = event.target.querySelector("button");
  loading = { ...$("tiles").dataset };
  button.setAttribute("aria-disabled", "true");
  $("load-result").textContent = "Loading\u2026";
  $("load-progress").hidden = false;
  showProgress();
  const text = await askToLoad();
  loading = null;
  $("load-progress").hidden = true;
  button.removeAttribute("aria-disabled");
  $("load-result").textContent = text;
}

function showProgress() {
  $("load-progress").max = Math.max(1, loading.waiting);
  $("load-progress").value = $("tiles").dataset.loaded - loading.loaded;
}

async function askToLoad() {
  try {
    const answer = await fetch("load", { method: "POST", headers: { Accept: "application/json" } });
    const { status_message, loaded, failed, silent } = await answer.json();
    if (!answer.ok) return `Not done: ${status_message}`;
    const rows = few(loaded, ([lane, count]) => `${lane} ${count.toLocaleString("en-US")}`, ", ");
    const whys = few(failed, ([lane, why]) => `${lane}: ${why}`, "; ");
    const parts = rows ? [`Loaded rows: ${rows}.`] : [];
    if (whys) parts.push(`Not loaded: ${whys}`);
    if (silent) parts.push(`No answer from ${silent.join(", ")}.`);
    return parts.join(" ") || "Nothing was waiting.";
  } catch {
    return "The connection was lost meanwhile: see the numbers once the service is back.";
  }
}

// The first of many, and how many there are more.
function few(all, say, between) {
  const said = Object.entries(all).map(say);
  const more = said.length - TYPES_NAMED;
  if (more > 0) said.splice(TYPES_NAMED, more, `and ${more.toLocaleString("en-US")} more types`);
  return said.join(between);
}

// --- what the reader wants to see ---

// A link opens or closes a row without loading the page anew; its address is the same.
function open(event) {
  const link = event.target.closest("#types th a, #idle a");
  if (!link || lost || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  history.pushState(null, "", link.href);
  asked = new URL(link.href).hash.slice(1);
  listen();
}

let typed = 0;

function search(event) {
  if (lost && event.type === "submit") return;
  event.preventDefault();
  clearTimeout(typed);
  typed = setTimeout(() => {
    const query = new URLSearchParams(new FormData($("search")));
    for (const [key, value] of [...query]) if (!value) query.delete(key);
    history.replaceState(null, "", `${query}` ? `?${query}` : location.pathname);
    asked = "";
    listen();
  }, TYPING_MS);
}

function answer() {
  const row = asked && $(asked);
  if (row) {
    row.scrollIntoView({ block: "nearest" });
    row.querySelector("a").focus({ preventScroll: true });
  } else $("announcer").textContent = $("types-said").textContent;
  asked = null;
}

// --- the connection ---

function listen() {
  stream?.close();
  heardAt = Date.now();
  stream = new EventSource(`stream?sections&${location.search.slice(1)}`);
  stream.onmessage = (event) => {
    heardAt = Date.now();
    show(JSON.parse(event.data));
  };
  stream.onerror = lose;
}

function lose() {
  if (lost) return;
  lost = true;
  const since = new Date().toISOString().slice(11, 19);
  $("link").textContent = "no connection";
  document.body.classList.add("stale");
  $("summary").dataset.is = "unreachable";
  $("sentence").textContent = `No connection to datapipe since ${since} UTC. What you see is from then; this page asks again by itself.`;
  $("announcer").textContent = "No connection to datapipe.";
}

// The browser asks again by itself, but not after an answer other than 200, and it does not
// notice a connection that died without a word. A page that nobody sees needs no stream.
setInterval(() => {
  if (document.hidden) return;
  if (stream?.readyState === EventSource.CLOSED) return listen();
  if (Date.now() - heardAt > SILENT_MS) {
    lose();
    listen();
  }
}, 1000);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) stream?.close();
  else listen();
});
const { version } = $("uptime").dataset;
$("load")?.addEventListener("submit", loadNow);
$("search")?.addEventListener("input", search);
$("search")?.addEventListener("submit", search);
document.addEventListener("click", open);
addEventListener("popstate", listen);
document.body.classList.add("script");
listen();
