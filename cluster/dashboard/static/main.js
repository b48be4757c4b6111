// The page: what each poll brings goes to those who show it.

import { byId, element, setAttribute, setText } from "./dom.js";
import { clock, count, plural } from "./format.js";
import { HeatMap } from "./heat_map.js";
import { History } from "./history.js";
import { Hosts } from "./hosts.js";
import { Poll } from "./poll.js";
import { Tiles } from "./tiles.js";
import { Timeline } from "./timeline.js";

const NUM_HOTTEST = 5;
const NOWHERE = { hosts: [], holders: [] };
const history = new History(), heatMap = new HeatMap(), tiles = new Tiles(), timeline = new Timeline();
const hosts = new Hosts((id) => heatMap.highlight(id));
let data = null, placement = NOWHERE, isAway = false;

function show(answer) {
  data = answer;
  placement = answer.placement ?? placement;
  if (isAway) note("this page hears of the cluster again", "good");
  isAway = false;
  history.add(answer);
  timeline.add(answer.events);
  connection("live", `live · ${clock(answer.time_unix_s)}`);
  byId("key-form").hidden = true;
  setAttribute(byId("board"), "data-stale", null);
  document.title = `${answer.model} · Shoal`;
  setText(byId("model"), answer.model);
  setText(byId("summary"), summary(answer));
  setText(byId("failure"), answer.failure ?? "");
  byId("failure").hidden = answer.failure === null;
  tiles.render(history, answer);
  heatMap.render(answer.experts, placement);
  hottest(answer.experts);
  hosts.render(answer);
  timeline.render(history, answer.time_unix_s);
}

function summary(answer) {
  const map = answer.map_version ? `map ${answer.map_version.split(".").at(-1)}` : "no map published yet";
  const experts = answer.num_experts === answer.num_ready ? plural(answer.num_experts, "expert") : `${answer.num_ready} of ${plural(answer.num_experts, "expert")} ready`;
  const open = answer.operations.length ? ` · ${answer.operations.map((operation) => `${operation.kind} ${operation.state}`).join(", ")}` : "";
  return `${experts} on ${plural(answer.hosts.length, "host")} · ${plural(answer.routers.length, "router")} · ${map}${open}`;
}

function trouble(sentence) {
  if (!isAway && data) note(`this page hears nothing: ${sentence}`, "bad");
  isAway = true;
  const last = data ? `, what you see is from ${clock(data.time_unix_s)}` : "";
  connection("away", `${sentence.replace(/\.$/, "")}${last}; trying again`);
  setAttribute(byId("board"), "data-stale", "");
}

function keyWanted(sentence) {
  trouble(sentence);
  byId("key-form").hidden = false;
}

function connection(state, text) {
  const pill = byId("connection");
  // A live region that changed each second would never be silent: while all is well only its state is spoken.
  setAttribute(pill, "aria-live", state === "live" && pill.dataset.state === "live" ? "off" : "polite");
  setAttribute(pill, "data-state", state);
  setText(pill, text);
}

// An event of the page's own, on the clock of the cluster as far as it is known.
function note(text, tone) {
  const time_unix_s = tone === "good" ? data.time_unix_s : Date.now() / 1e3;
  timeline.add([{ n: 0, time_unix_s, kind: "page", lane: "trouble", tone, text }]);
  timeline.render(history, Math.max(time_unix_s, data.time_unix_s));
}

function hottest(experts) {
  const all = experts.tokens_per_s.flatMap((rates, row) => {
    const mean = rates.reduce((sum, rate) => sum + rate, 0) / Math.max(1, rates.length);
    return rates.map((rate, expert) => ({ row, expert, rate, times: mean > 0 ? rate / mean : 0 }));
  });
  const rows = all.filter(({ rate }) => rate > 0).sort((a, b) => b.rate - a.rate).slice(0, NUM_HOTTEST).map(({ row, expert, rate, times }) =>
    [experts.layers[row], expert, count(rate), times.toFixed(1), placement.holders[row]?.[expert]?.length ?? 0]);
  const cells = rows.length ? rows.map((row) => element("tr", {}, ...row.map((text) => element("td", {}, String(text))))) :
    [element("tr", {}, element("td", { colspan: "5" }, "no tokens of late"))];
  document.querySelector("#hottest tbody").replaceChildren(...cells);
}

const poll = new Poll(show, trouble, keyWanted);
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  poll.useKey(byId("key").value.trim());
  byId("key").value = "";
});
poll.ask();
