// Hosts with their slots, and routers: one card each, kept while its member lives, and for a while after.

import { byId, element, setAttribute, setText } from "./dom.js";
import { ago, bytes, count, milliseconds, percent, plural } from "./format.js";

const REMEMBERED_S = 120;
const NUM_ROOMY = 16; // more cards than these say less each
const TONES = { ready: "good", suspected: "bad", leaving: "warn", draining: "warn", loading: "warn", drained: "plain", empty: "plain" };

export class Hosts {
  // `onChoose(id or null)`: whose experts are to stand out on the map.
  constructor(onChoose) {
    this.hosts = new Cards(byId("hosts"), (id) => this.choose(id));
    this.routers = new Cards(byId("routers"), null);
    this.chosen = null;
    this.onChoose = onChoose;
  }

  choose(id) {
    this.chosen = this.chosen === id ? null : id;
    this.hosts.press(this.chosen);
    this.onChoose(this.chosen);
  }

  render(data) {
    const now_s = data.time_unix_s;
    this.hosts.render(data.hosts, now_s, hostFace);
    this.routers.render(data.routers, now_s, (router) => routerFace(router, data.map_version));
    if (this.chosen !== null && !data.hosts.some((host) => host.id === this.chosen)) this.choose(this.chosen);
    const ready = data.hosts.filter((host) => host.state === "ready").length;
    const alone = data.num_standalone ? ` · ${plural(data.num_standalone, "expert")} on one host only` : "";
    setText(byId("hosts-note"), `${ready} of ${data.hosts.length} ready${alone}`);
    byId("routers-title").hidden = data.routers.length === 0;
  }
}

class Cards {
  constructor(list, onChoose) {
    Object.assign(this, { list, onChoose, cards: new Map() });
  }

  render(members, now_s, faceOf) {
    for (const member of members) {
      if (!this.cards.has(member.id)) this.cards.set(member.id, new Card(member.id, this.onChoose));
      const card = this.cards.get(member.id);
      card.seen_s = now_s;
      card.render(faceOf(member));
    }
    for (const [id, card] of this.cards) {
      if (card.seen_s === now_s) continue;
      if (now_s - card.seen_s > REMEMBERED_S) { card.node.remove(); this.cards.delete(id); } else card.render(goneFace(now_s - card.seen_s));
    }
    this.list.classList.toggle("many", this.cards.size > NUM_ROOMY);
    const inOrder = [...this.cards.entries()].sort(([a], [b]) => (a < b ? -1 : 1)).map(([, card]) => card.node);
    inOrder.forEach((node, index) => { if (this.list.children[index] !== node) this.list.insertBefore(node, this.list.children[index] ?? null); });
  }

  press(chosen) {
    for (const [id, card] of this.cards) card.name.setAttribute("aria-pressed", String(id === chosen));
  }
}

class Card {
  constructor(id, onChoose) {
    this.name = onChoose ? element("button", { type: "button", "aria-pressed": "false", title: "Show its experts on the map" }, id) : element("span", { class: "name" }, id);
    if (onChoose) this.name.addEventListener("click", () => onChoose(id));
    this.state = element("span", { class: "state" });
    this.fill = element("i");
    this.meter = element("div", { class: "meter", role: "meter", "aria-valuemin": "0", "aria-valuemax": "100" }, this.fill);
    this.lines = [element("div"), element("div"), element("div", { class: "faint" })];
    this.node = element("li", { class: "host" }, element("div", { class: "top" }, this.name, this.state), this.meter, ...this.lines);
  }

  render({ tone, state, share, meter, lines }) {
    setAttribute(this.node, "data-tone", tone);
    setText(this.state, state);
    this.fill.style.width = `${100 * share}%`;
    setAttribute(this.meter, "aria-label", meter);
    setAttribute(this.meter, "aria-valuenow", String(Math.round(100 * share)));
    this.meter.hidden = meter === null;
    this.lines.forEach((line, index) => { setText(line, lines[index]); line.hidden = !lines[index]; });
  }
}

function hostFace(host) {
  const places = host.slots ?? (host.bytes_limit && host.expert_bytes ? Math.floor(host.bytes_limit / host.expert_bytes) : null);
  const whole = Math.max(places ?? host.desired, host.ready, 1);
  const held = host.ready === host.desired ? `${host.ready}` : `${host.ready} (shall hold ${host.desired})`;
  const memory = host.expert_bytes ? ` · ${bytes(host.ready * host.expert_bytes)}` : "";
  return {
    tone: TONES[host.state] ?? "plain",
    state: host.state,
    share: Math.min(1, host.ready / whole),
    meter: places === null ? "experts held, of those it shall hold" : "slots in use",
    lines: [
      `${held} experts${places === null ? "" : ` in ${places} slots`}${memory}`,
      `${count(host.tokens_per_s)} tokens/s · ${percent(host.busy_share)} busy`,
      `${milliseconds(host.wait_s)} in its queue · node ${host.node_id.slice(0, 8)}`,
    ],
  };
}

function routerFace(router, published) {
  const isBehind = router.map_version !== published;
  const suspects = router.suspects.length ? ` · cannot reach ${router.suspects.join(", ")}` : "";
  return {
    tone: suspects ? "bad" : isBehind ? "warn" : "good",
    state: router.map_version === "" ? "no map yet" : `map ${router.map_version.split(".").at(-1)}`,
    share: Math.min(1, router.kv_use),
    meter: "KV cache in use",
    lines: [
      `${count(router.num_running)} running · ${count(router.num_waiting)} waiting`,
      `KV cache ${percent(router.kv_use)}${suspects}`,
      `node ${router.node_id.slice(0, 8)}`,
    ],
  };
}

function goneFace(away_s) {
  return { tone: "gone", state: "gone", share: 0, meter: null, lines: [`last heard of ${ago(away_s)}`, "", ""] };
}
