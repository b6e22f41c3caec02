// Numbers as people read them: the same as datapipe/monitor/formats.py, and a test compares the two.
const NOTHING = "\u2013";

const rounded = (value, digits) => Math.floor(value * 10 ** digits + 0.5) / 10 ** digits;
const one = (value) => rounded(value, 1).toFixed(1);

function count(value) {
  return rounded(value, 0).toLocaleString("en-US", { maximumFractionDigits: 0 });
}

function size(value) {
  if (value < 1024) return `${rounded(value, 0)} B`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let unit = -1;
  do {
    value /= 1024;
    unit += 1;
  } while (value >= 1023.95 && unit < units.length - 1);
  return `${one(value)} ${units[unit]}`;
}

function seconds(value) {
  if (value < 0.9995) return value ? `${rounded(value * 1000, 0)} ms` : "0 s";
  if (value < 9.95) return `${one(value)} s`;
  const whole = rounded(value, 0);
  const two = (big, small, names) =>
    `${Math.floor(whole / big)} ${names[0]} ${Math.floor((whole % big) / small)} ${names[1]}`;
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return two(60, 1, ["min", "s"]);
  if (whole < 86400) return two(3600, 60, ["h", "min"]);
  return two(86400, 3600, ["d", "h"]);
}

function clock(value) {
  const today = value.slice(0, 10) === new Date().toISOString().slice(0, 10);
  return today ? value.slice(11, 19) : `${value.slice(0, 10)} ${value.slice(11, 16)}`;
}

const some = (format) => (value) => (value === null || value === undefined ? NOTHING : format(value));

export const FORMATS = {
  count: some(count),
  zero: (value) => count(value ?? 0),
  size: some(size),
  rate: some((value) => (value > 0 && value < 99.95 ? one(value) : count(value))),
  seconds: some(seconds),
  clock: some(clock),
  text: some(String),
  percent: some((value) => `${one(value * 100)} %`),
  check: (value) => (value ? "\u2713" : "\u2717"),
  outcome: (value) => value ?? "loaded",
  up: (value) => (value ? "up" : "down"),
};
