// The pictures. datapipe/monitor/charts.py draws the same ones for a page that was just opened.
import { FORMATS } from "./format.js";

const WIDTH = 360;
const HEIGHT = 80;

function topOf(...series) {
  const most = Math.max(0, ...series.flat());
  if (most <= 1) return 1;
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 5, 10].map((step) => step * power).find((value) => value >= most);
}

const first = (values, points) => WIDTH - ((values.length - 1) * WIDTH) / (points - 1);

function line(values, most, points) {
  if (!values.length) return "";
  const from = first(values, points);
  const x = (i) => (from + (i * WIDTH) / (points - 1)).toFixed(1);
  return "M" + values.map((v, i) => `${x(i)} ${(HEIGHT - (v / most) * HEIGHT).toFixed(1)}`).join("L");
}

function area(values, most, points) {
  return values.length ? `${line(values, most, points)}V${HEIGHT}H${first(values, points).toFixed(1)}Z` : "";
}

// Draw both charts of one lane; `history` tells the step and how many points there can be.
export function draw(picture, name, series, history) {
  for (const chart of picture.querySelectorAll(".chart")) {
    const keys = chart.dataset.chart === "rate" ? ["accepted", "loaded"] : ["waiting"];
    const most = topOf(...keys.map((key) => series[key]));
    for (const path of chart.querySelectorAll("path")) {
      const key = keys.find((each) => path.classList.contains(each));
      const shape = path.classList.contains("fill") ? area : line;
      if (key) path.setAttribute("d", shape(series[key], most, history.points));
    }
    chart.querySelector(".top").textContent = FORMATS.count(most);
    chart.data = { keys, series, history, name, until: Date.now() };
    if (!chart.handled) handle(chart);
    point(chart, chart.back ?? null);
  }
}

// Tell the values `back` steps before now, or with null the latest and the highest.
function point(chart, back) {
  const { keys, series, history, until } = chart.data;
  const length = series[keys[0]].length;
  const plot = chart.querySelector(".plot");
  const at = back === null ? length - 1 : length - 1 - back;
  const known = at >= 0 && at < length;
  const x = WIDTH - ((back ?? 0) * WIDTH) / (history.points - 1);
  chart.back = back;
  chart.classList.toggle("pointed", back !== null);
  chart.querySelector(".cursor").setAttribute("d", back === null ? "" : `M${x} 0V${HEIGHT}`);
  const unit = keys.length > 1 ? " per s" : "";
  const told = known
    ? keys.map((key) => `${FORMATS[unit ? "rate" : "count"](series[key][at])} ${key}${unit}`).join(", ")
    : "not known";
  const when = new Date(until - (back ?? 0) * history.step_seconds * 1000).toISOString().slice(11, 19);
  chart.querySelector(".readout").textContent = back === null ? (length ? told : "") : `${when}: ${told}`;
  plot.setAttribute("aria-valuenow", String(-(back ?? 0)));
  plot.setAttribute("aria-valuetext", `${when} UTC, ${told}`);
}

// Hover, touch and arrow keys move along the time; to a screen reader it is a slider over it.
function handle(chart) {
  chart.handled = true;
  const plot = chart.querySelector(".plot");
  const { history, name } = chart.data;
  const last = history.points - 1;
  const label = plot.getAttribute("aria-label").replace(/^[^:]*/, () => name);
  const attributes = { role: "slider", tabindex: "0", "aria-valuemin": -last, "aria-valuemax": 0 };
  for (const [key, value] of Object.entries({ ...attributes, "aria-label": label })) plot.setAttribute(key, value);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (box.right - event.clientX) / box.width));
    point(chart, Math.round(share * last));
  });
  for (const away of ["pointerleave", "blur"]) plot.addEventListener(away, () => point(chart, null));
  const steps = { ArrowLeft: 1, ArrowDown: 1, ArrowRight: -1, ArrowUp: -1, PageUp: -12, PageDown: 12, Home: last, End: -last };
  plot.addEventListener("keydown", (event) => {
    if (!(event.key in steps)) return;
    event.preventDefault();
    point(chart, Math.min(last, Math.max(0, (chart.back ?? 0) + steps[event.key])));
  });
}
