// Which colour an expert has: by its load, by its load over its replicas, or by the number of them.

import { element, themeColors } from "./dom.js";
import { count } from "./format.js";

const STOPS = ["--heat-0", "--heat-1", "--heat-2", "--heat-3", "--heat-4", "--heat-5"];
const NUM_COLORS = 64;
const FAINTEST = 0.05; // tokens/s: below it an idle cluster's last traces would glow

// 64 colours between the theme's stops, each with the ink that can be read on it, and the one for an expert that stands nowhere.
export function colorTable() {
  const stops = themeColors(STOPS).map(channels), [missing] = themeColors(["--missing"]);
  const table = Array.from({ length: NUM_COLORS }, (_, index) => {
    const at = (index / (NUM_COLORS - 1)) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
    const mixed = stops[low].map((value, channel) => value + (stops[low + 1][channel] - value) * (at - low));
    const light = 0.2126 * mixed[0] + 0.7152 * mixed[1] + 0.0722 * mixed[2] > 120;
    return { color: `rgb(${mixed.map(Math.round).join(" ")})`, ink: light ? "rgb(0 0 0 / .7)" : "rgb(255 255 255 / .85)" };
  });
  return { table, missing: { color: missing, ink: missing } };
}

function channels(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

export class HeatScale {
  constructor(experts, placement, mode, colors) {
    Object.assign(this, { experts, placement, mode, colors });
    this.means = experts.tokens_per_s.map((rates) => rates.reduce((sum, rate) => sum + rate, 0) / Math.max(1, rates.length));
    this.most = 0;
    this.numMissing = 0;
    this.seen = new Set();
    experts.tokens_per_s.forEach((rates, row) => rates.forEach((_, column) => {
      const replicas = placement.holders[row]?.[column]?.length ?? 0;
      this.seen.add(replicas);
      this.numMissing += replicas === 0;
      this.most = Math.max(this.most, this.value(row, column, replicas));
    }));
    if (mode !== "replicas") this.most = Math.max(this.most, FAINTEST);
  }

  value(row, column, replicas) {
    const rate = this.experts.tokens_per_s[row][column];
    return this.mode === "replicas" ? replicas : this.mode === "share" ? rate / Math.max(1, replicas) : rate;
  }

  mean(row) {
    return this.means[row];
  }

  paint(row, column, replicas) {
    if (replicas === 0 && this.placement.hosts.length) return this.colors.missing;
    return this.color(this.value(row, column, replicas));
  }

  // Loads are skewed: by the root, the many cool experts can be told apart beside the few hot ones.
  color(value) {
    const share = this.mode === "replicas" ? (this.most > 1 ? (value - 1) / (this.most - 1) : 0) * 0.85 + 0.12 : Math.sqrt(value / this.most);
    return this.colors.table[Math.max(0, Math.min(NUM_COLORS - 1, Math.round(share * (NUM_COLORS - 1))))];
  }

  legend(host) {
    const swatch = (color, text) => {
      const mark = element("i");
      mark.style.background = color;
      return element("span", {}, mark, text);
    };
    const parts = [];
    if (this.mode === "replicas") {
      const present = [...this.seen].filter((replicas) => replicas > 0).sort((a, b) => a - b);
      for (const replicas of present) parts.push(swatch(this.color(replicas).color, `${replicas} host${replicas === 1 ? "" : "s"}`));
    } else {
      const unit = this.mode === "share" ? "tokens/s a replica" : "tokens/s";
      parts.push(element("span", {}, "0", element("i", { class: "ramp" }), `${count(this.most)} ${unit}, by the root`));
      if (Math.max(...this.seen) > 1) parts.push(element("span", {}, "dots: replicas, where there are several"));
    }
    if (this.numMissing && this.placement.hosts.length) parts.push(swatch(this.colors.missing.color, `${this.numMissing} on no host`));
    if (host !== null) parts.push(element("span", {}, `bright: on ${host}`));
    return parts;
  }
}
