// The numbers on top, each with its last minutes.

import { byId, element, setText, sharpContext, themeColors } from "./dom.js";
import { NONE, ago, clock, count, milliseconds, money, percent } from "./format.js";

const SHORTEST_S = 120, LONGEST_S = 600, GAP_S = 5, HEIGHT = 46;

// `lines` are names in the history, the first drawn filled; `note` is what stands below the number, its first part in the second
// line's colour where there is one.
const TILES = [
  { id: "tokens", title: "Tokens per second", lines: ["generated", "prompt"], text: count, unit: "generated",
    note: (history) => [`${count(history.last("prompt"))} of prompts`] },
  { id: "first", title: "Time to first token", lines: ["first50", "first99"], text: milliseconds, unit: "p50",
    note: (history) => [`${milliseconds(history.last("first99"))} p99`, " · last 30 s"], shown: (data) => data.latency !== null },
  { id: "gap", title: "Time between tokens", lines: ["gap50", "gap99"], text: milliseconds, unit: "p50",
    note: (history) => [`${milliseconds(history.last("gap99"))} p99`, " · last 30 s"], shown: (data) => data.latency !== null },
  { id: "balance", title: "Balancedness", lines: ["balancedness"], text: (value) => (value === null ? NONE : value.toFixed(2)), unit: "", top: 1,
    note: (history, data) => ["", data.planned_balancedness === null ? "mean host load / busiest" : `${data.planned_balancedness.toFixed(2)} as planned`] },
  { id: "kv", title: "KV cache in use", lines: ["kv_use"], text: percent, unit: "", top: 1,
    note: (history) => ["", `${count(history.last("running"))} running · ${count(history.last("waiting"))} waiting`] },
  { id: "cost", title: "Cost per million tokens", lines: ["cost"], text: (value, data) => (value === null ? NONE : money(value, data.currency)), unit: "",
    note: (history, data) => ["", `${money(data.price_per_hour, data.currency)} an hour${history.last("cost") === null ? ", no tokens now" : ""}`],
    shown: (data) => data.price_per_hour !== null },
];

export class Tiles {
  constructor() {
    this.tiles = TILES.map((tile) => new Tile(tile));
    byId("tiles").append(...this.tiles.map((tile) => tile.node));
  }

  render(history, data) {
    for (const tile of this.tiles) tile.render(history, data);
  }
}

class Tile {
  constructor(tile) {
    this.tile = tile;
    this.number = element("span");
    this.notes = [element("span", { class: "second" }), element("span")];
    this.canvas = element("canvas", { role: "img", height: HEIGHT });
    const value = element("p", { class: "value", id: `tile-${tile.id}` }, this.number, " ", element("small", tile.lines.length > 1 ? { class: "first" } : {}, tile.unit));
    const note = element("p", { class: "faint" }, ...this.notes);
    this.node = element("article", { class: "tile", hidden: "" }, element("h2", {}, tile.title), value, note, this.canvas);
    this.pointed = null;
    this.canvas.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  render(history, data) {
    this.node.hidden = this.tile.shown ? !this.tile.shown(data) : false;
    if (this.node.hidden) return;
    Object.assign(this, { history, data });
    this.draw();
  }

  point(x) {
    this.pointed = x;
    this.draw();
  }

  draw() {
    const width = this.canvas.clientWidth, samples = this.history?.samples ?? [];
    if (!width || !samples.length) return;
    const now_s = samples.at(-1).time_s;
    const span_s = Math.min(LONGEST_S, Math.max(SHORTEST_S, now_s - samples[0].time_s));
    const shown = samples.filter((sample) => sample.time_s >= now_s - span_s);
    const values = this.tile.lines.flatMap((name) => shown.map((sample) => sample[name])).filter((value) => value !== null);
    const top = this.tile.top ?? (Math.max(...values, 0) * 1.1 || 1);
    const x = (sample) => width - 2 - ((now_s - sample.time_s) / span_s) * (width - 4);
    const y = (value) => HEIGHT - 2 - (value / top) * (HEIGHT - 6);
    const context = sharpContext(this.canvas, width, HEIGHT);
    const [accent, second, line] = themeColors(["--accent", "--second", "--line"]);
    context.fillStyle = line;
    context.fillRect(0, HEIGHT - 1, width, 1);
    const colors = [accent, second];
    for (const [index, name] of [...this.tile.lines.entries()].reverse()) plot(context, shown, name, x, y, colors[index], index === 0);
    const sample = this.pointed === null ? shown.at(-1) : nearest(shown, x, this.pointed);
    if (this.pointed !== null) {
      context.fillStyle = second;
      context.fillRect(x(sample), 0, 1, HEIGHT);
    }
    this.tell(sample, values, span_s);
  }

  tell(sample, values, span_s) {
    const [first, other] = this.tile.lines, { text } = this.tile;
    setText(this.number, text(sample[first], this.data));
    const pointed = [other ? `${text(sample[other], this.data)} ${this.tile.id === "tokens" ? "of prompts" : "p99"}` : "", ` at ${clock(sample.time_s)}`];
    const [named, ...rest] = this.pointed === null ? this.tile.note(this.history, this.data) : pointed;
    setText(this.notes[0], named);
    setText(this.notes[1], rest.join(""));
    const range = values.length ? `between ${text(Math.min(...values), this.data)} and ${text(Math.max(...values), this.data)}` : "nothing measured";
    this.canvas.setAttribute("aria-label", `${this.tile.title} since ${ago(span_s)}: ${range}`);
  }
}

function nearest(samples, x, at) {
  return samples.reduce((best, sample) => (Math.abs(x(sample) - at) < Math.abs(x(best) - at) ? sample : best));
}

// Runs of values; where nothing was known for a while there is nothing.
function plot(context, samples, name, x, y, color, isFilled) {
  const runs = [];
  let last = null;
  for (const sample of samples) {
    if (sample[name] === null) { last = null; continue; }
    if (last === null || sample.time_s - last.time_s > GAP_S) runs.push([]);
    runs.at(-1).push([x(sample), y(sample[name])]);
    last = sample;
  }
  context.strokeStyle = context.fillStyle = color;
  context.lineWidth = isFilled ? 1.75 : 1.25;
  context.lineJoin = "round";
  for (const run of runs) {
    const path = new Path2D();
    run.forEach(([px, py], index) => (index ? path.lineTo(px, py) : path.moveTo(px, py)));
    if (run.length === 1) path.lineTo(run[0][0] + 1, run[0][1]);
    context.stroke(path);
    if (!isFilled) continue;
    path.lineTo(run.at(-1)[0], HEIGHT);
    path.lineTo(run[0][0], HEIGHT);
    context.globalAlpha = 0.16;
    context.fill(path);
    context.globalAlpha = 1;
  }
}
