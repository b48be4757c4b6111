// Layers x experts: how many tokens each takes, on how many hosts it stands. One canvas, whatever their number.

import { byId, element, setText, sharpContext, themeColors } from "./dom.js";
import { HeatScale, colorTable } from "./heat_scale.js";
import { count, plural } from "./format.js";

const AXIS = 34, TOP = 16, NARROWEST = 3, HIGHEST = 18;

export class HeatMap {
  constructor() {
    this.canvas = byId("heat-canvas");
    this.mode = "load";
    this.host = null; // its experts stand out
    this.cursor = null; // {row, column} in layers and experts
    this.colors = colorTable();
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("focus", () => this.move(this.cursor ?? { row: 0, column: 0 }));
    byId("heat-mode").addEventListener("change", (event) => { this.mode = event.target.value; this.draw(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { this.colors = colorTable(); this.draw(); });
    new ResizeObserver(() => this.draw()).observe(this.canvas.parentElement);
  }

  render(experts, placement) {
    Object.assign(this, { experts, placement });
    byId("heat").hidden = experts.layers.length === 0;
    this.draw();
  }

  highlight(host) {
    this.host = host;
    this.draw();
  }

  draw() {
    if (!this.experts?.layers.length) return;
    const width = this.canvas.parentElement.clientWidth;
    if (!width) return;
    this.scale = new HeatScale(this.experts, this.placement, this.mode, this.colors);
    this.lay(width);
    this.canvas.style.height = `${this.grid.height}px`;
    const context = sharpContext(this.canvas, width, this.grid.height);
    this.drawAxes(context);
    this.drawCells(context);
    this.drawCursor(context);
    this.tell();
  }

  // What there is more of stands from left to right; on a screen too narrow for that, downwards.
  lay(width) {
    const rows = this.experts.layers.length, columns = this.experts.num_experts;
    const isNarrow = (width - AXIS) / Math.max(rows, columns) < NARROWEST;
    const isTurned = rows > columns !== isNarrow;
    const [across, down] = isTurned ? [rows, columns] : [columns, rows];
    const wide = (width - AXIS) / across;
    const high = Math.min(HIGHEST, Math.max(isNarrow ? 4 : 7, wide));
    this.grid = { isTurned, across, down, wide, high, height: TOP + down * high };
  }

  box(row, column) {
    const { isTurned, wide, high } = this.grid;
    const [i, j] = isTurned ? [column, row] : [row, column];
    const left = AXIS + j * wide, top = TOP + i * high;
    const gapX = wide >= 5 ? 1 : 0, gapY = high >= 6 ? 1 : 0;
    return [left, top, wide - gapX, high - gapY];
  }

  drawAxes(context) {
    const { isTurned, across, down, wide, high } = this.grid;
    const [faint] = themeColors(["--faint"]);
    context.fillStyle = faint;
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const step = (size) => [1, 2, 4, 8, 16, 32, 64].find((each) => each * size >= 24) ?? 64;
    const name = (index) => this.experts.layers[index];
    for (let i = 0; i < down; i += step(high * 1.8)) context.fillText(isTurned ? i : name(i), AXIS - 6, TOP + (i + 0.5) * high);
    context.textAlign = "center";
    for (let j = 0; j < across; j += step(wide)) context.fillText(isTurned ? name(j) : j, AXIS + (j + 0.5) * wide, TOP / 2);
  }

  drawCells(context) {
    const { wide, high } = this.grid, hasDots = this.mode !== "replicas" && wide >= 9 && high >= 9;
    const chosen = this.host === null ? -1 : this.placement.hosts.indexOf(this.host);
    for (let row = 0; row < this.experts.layers.length; row += 1) {
      for (let column = 0; column < this.experts.tokens_per_s[row].length; column += 1) {
        const [left, top, w, h] = this.box(row, column), holders = this.holders(row, column);
        const { color, ink } = this.scale.paint(row, column, holders.length);
        context.globalAlpha = chosen >= 0 && !holders.includes(chosen) ? 0.18 : 1;
        context.fillStyle = color;
        context.fillRect(left, top, w, h);
        if (hasDots && holders.length > 1) drawDots(context, left, top, w, h, holders.length, ink);
      }
    }
    context.globalAlpha = 1;
  }

  drawCursor(context) {
    if (!this.cursor) return;
    const [left, top, w, h] = this.box(this.cursor.row, this.cursor.column);
    const [text, surface] = themeColors(["--text", "--surface"]);
    for (const [color, grow] of [[surface, 2.5], [text, 1]]) {
      context.strokeStyle = color;
      context.lineWidth = color === text ? 2 : 1.5;
      context.strokeRect(left - grow, top - grow, w + 2 * grow, h + 2 * grow);
    }
  }

  holders(row, column) {
    return this.placement.holders[row]?.[column] ?? [];
  }

  point(event) {
    if (!this.grid) return;
    const { isTurned, across, down, wide, high } = this.grid;
    const j = Math.floor((event.offsetX - AXIS) / wide), i = Math.floor((event.offsetY - TOP) / high);
    if (i < 0 || j < 0 || i >= down || j >= across) return;
    this.move(isTurned ? { row: j, column: i } : { row: i, column: j });
  }

  key(event) {
    if (!this.grid) return;
    const across = this.grid.isTurned ? "row" : "column", down = this.grid.isTurned ? "column" : "row";
    const steps = { ArrowLeft: [across, -1], ArrowRight: [across, 1], ArrowUp: [down, -1], ArrowDown: [down, 1], Home: ["column", -1e6], End: ["column", 1e6] };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const [axis, step] = steps[event.key], at = this.cursor ?? { row: 0, column: 0 };
    this.move({ ...at, [axis]: at[axis] + step });
  }

  move({ row, column }) {
    if (!this.experts) return;
    const lastRow = this.experts.layers.length - 1, lastColumn = this.experts.num_experts - 1;
    this.cursor = { row: Math.min(Math.max(row, 0), lastRow), column: Math.min(Math.max(column, 0), lastColumn) };
    this.draw();
    setText(byId("heat-spoken"), byId("heat-readout").textContent); // spoken when the cursor moves, not at every poll
  }

  // What the cell under the cursor is, and what the colours mean.
  tell() {
    const { experts } = this;
    const numReplicas = this.placement.holders.flat().reduce((sum, hosts) => sum + hosts.length, 0);
    setText(byId("heat-note"), `${plural(experts.layers.length, "layer")} × ${plural(experts.num_experts, "expert")}, ${plural(numReplicas, "replica")}, load of the last ${Math.round(experts.window_s)} s. ` +
      (this.grid.isTurned ? "Layers from left to right, experts downwards." : "Layers downwards, experts from left to right."));
    byId("heat-legend").replaceChildren(...this.scale.legend(this.host));
    if (!this.cursor) { setText(byId("heat-readout"), "No expert is pointed at."); return; }
    const { row, column } = this.cursor;
    if (row >= experts.layers.length || column >= (experts.tokens_per_s[row]?.length ?? 0)) { this.cursor = null; return; }
    const hosts = this.holders(row, column).map((index) => this.placement.hosts[index]);
    const rate = experts.tokens_per_s[row][column], mean = this.scale.mean(row);
    const times = mean > 0 ? ` (${(rate / mean).toFixed(1)} × the layer's mean)` : "";
    byId("heat-readout").replaceChildren(
      element("b", {}, `Layer ${experts.layers[row]}, expert ${column}`), `: ${count(rate)} tokens/s${times}, `,
      hosts.length ? `${plural(hosts.length, "replica")} on ${hosts.join(", ")}` : "on no host",
    );
  }
}

function drawDots(context, left, top, width, height, number, ink) {
  const shown = Math.min(number, 4), size = Math.max(1.5, Math.min(width, height) / 7);
  context.fillStyle = ink;
  for (let dot = 0; dot < shown; dot += 1) {
    context.fillRect(left + width / 2 + (dot - (shown - 1) / 2) * size * 1.8 - size / 2, top + height / 2 - size / 2, size, size);
  }
}
