// What happened and when: marks in lanes under the number of hosts, and the same in words.

import { byId, element, setText, svgElement } from "./dom.js";
import { clock, plural } from "./format.js";
import { KEPT_S } from "./history.js";

const LANES = ["members", "scaling", "placement", "operations", "trouble"]; // one that is not here stands in the first
const LEFT = 78, COUNT_HIGH = 40, LANE_HIGH = 22, AXIS_HIGH = 18, SHORTEST_S = 180, NUM_KEPT = 400, NUM_LISTED = 60;
const TONE_WORDS = { good: "good", plain: "", warn: "attention", bad: "bad" };

export class Timeline {
  constructor() {
    this.svg = byId("timeline");
    this.list = byId("events");
    this.events = new Map(); // what is told again, by a Coordinator that began anew, is the same event
    this.listed = "";
    new ResizeObserver(() => this.draw()).observe(this.svg.parentElement);
  }

  add(events) {
    for (const event of events) this.events.set(`${event.time_unix_s} ${event.text}`, event);
    const kept = [...this.events].sort(([, a], [, b]) => a.time_unix_s - b.time_unix_s).slice(-NUM_KEPT);
    this.events = new Map(kept);
  }

  render(history, now_s) {
    Object.assign(this, { history, now_s });
    this.draw();
    this.tell();
  }

  draw() {
    const width = this.svg.parentElement.clientWidth - this.padding();
    if (!this.history || width <= 0) return;
    const height = COUNT_HIGH + LANES.length * LANE_HIGH + AXIS_HIGH;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    const recent = [...this.events.values()].filter((event) => event.time_unix_s > this.now_s - KEPT_S);
    const oldest_s = Math.min(recent[0]?.time_unix_s ?? this.now_s, this.history.samples[0]?.time_s ?? this.now_s);
    const span_s = Math.min(KEPT_S, Math.max(SHORTEST_S, (this.now_s - oldest_s) * 1.04));
    const x = (time_s) => LEFT + (1 - (this.now_s - time_s) / span_s) * (width - LEFT - 8);
    this.svg.replaceChildren(...this.ticks(x, span_s, width, height), ...this.hostCount(x, span_s), ...this.lanes(width), ...marks(recent, x));
  }

  padding() {
    const style = getComputedStyle(this.svg.parentElement);
    return parseFloat(style.paddingLeft) + parseFloat(style.paddingRight);
  }

  ticks(x, span_s, width, height) {
    const step_s = [30, 60, 120, 300].find((step) => (step / span_s) * (width - LEFT) >= 52) ?? 300;
    const drawn = [];
    for (let ago_s = 0; ago_s <= span_s; ago_s += step_s) {
      const at = x(this.now_s - ago_s);
      const text = ago_s === 0 ? "now" : ago_s % 60 ? `−${ago_s} s` : `−${ago_s / 60} min`;
      drawn.push(svgElement("line", { class: "lane", x1: at, x2: at, y1: 4, y2: height - AXIS_HIGH }));
      drawn.push(svgElement("text", { x: at, y: height - 4, "text-anchor": ago_s === 0 ? "end" : "middle" }, text));
    }
    return drawn;
  }

  hostCount(x, span_s) {
    const samples = this.history.samples.filter((sample) => sample.time_s >= this.now_s - span_s);
    const most = Math.max(1, ...samples.map((sample) => sample.hosts));
    const y = (hosts) => COUNT_HIGH - 6 - (hosts / most) * (COUNT_HIGH - 14);
    let path = "", last = null;
    for (const sample of samples) {
      path += last === null || sample.time_s - last.time_s > 10 ? `M${x(sample.time_s)} ${y(sample.hosts)}` : `H${x(sample.time_s)}V${y(sample.hosts)}`;
      last = sample;
    }
    const label = svgElement("text", { x: 0, y: COUNT_HIGH / 2 + 2 }, plural(samples.at(-1)?.hosts ?? 0, "host"));
    return path ? [label, svgElement("path", { class: "count", d: path })] : [label];
  }

  lanes(width) {
    return LANES.flatMap((name, index) => {
      const y = COUNT_HIGH + (index + 0.5) * LANE_HIGH;
      return [svgElement("text", { x: 0, y: y + 4 }, name), svgElement("line", { class: "lane", x1: LEFT, x2: width, y1: y, y2: y })];
    });
  }

  // Of maps published one after another, as a move goes on, the last.
  tell() {
    const events = [...this.events.values()];
    const told = events.filter((event, index) => event.kind !== "publish" || events[index + 1]?.kind !== "publish").slice(-NUM_LISTED).reverse();
    const bad = events.filter((event) => event.tone === "bad" && event.time_unix_s > this.now_s - KEPT_S).length;
    setText(byId("events-note"), bad ? `${plural(bad, "failure")} in the last ${KEPT_S / 60} min` : `no failure in the last ${KEPT_S / 60} min`);
    const listed = told.map((event) => `${event.time_unix_s} ${event.text}`).join("\n");
    if (listed === this.listed) return;
    this.listed = listed;
    this.list.replaceChildren(...told.map(item));
  }
}

function item(event) {
  const time = element("time", { datetime: new Date(event.time_unix_s * 1e3).toISOString() }, clock(event.time_unix_s));
  const word = TONE_WORDS[event.tone] ? [element("b", { class: "unseen" }, `${TONE_WORDS[event.tone]}: `)] : [];
  return element("li", { "data-tone": event.tone }, time, element("i", { class: "mark", "aria-hidden": "true" }), element("span", {}, ...word, event.text));
}

// A shape for each tone, so that none is told by its colour alone.
function marks(events, x) {
  return events.map((event) => {
    const lane = Math.max(0, LANES.indexOf(event.lane));
    const at = x(event.time_unix_s), y = COUNT_HIGH + (lane + 0.5) * LANE_HIGH;
    const title = svgElement("title", {}, `${clock(event.time_unix_s)} ${event.text}`);
    const named = { class: "mark", "data-tone": event.tone };
    if (event.tone === "good") return svgElement("circle", { ...named, cx: at, cy: y, r: 5 }, title);
    if (event.tone === "plain") return svgElement("rect", { ...named, x: at - 2, y: y - 6, width: 4, height: 12, rx: 1 }, title);
    return svgElement("path", { ...named, d: `M${at} ${y - 7}L${at + 7} ${y + 5}H${at - 7}Z` }, title);
  });
}
