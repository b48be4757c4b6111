// Some minutes of what was polled, as the few numbers that are drawn over time. Counters become rates here.

export const KEPT_S = 900;
const RATE_S = 5, LATENCY_S = 30, COST_S = 60, SET_BACK_S = 60;
const COUNTERS = { generated: "num_generated_tokens", prompt: "num_prefill_tokens" };

export class History {
  constructor() {
    this.samples = []; // {time_s, rates and numbers by name}, oldest first
    this.totals = []; // {time_s, generated, prompt, latency}, likewise
    this.routers = new Map(); // a router's counters when it was seen last
    this.sums = { generated: 0, prompt: 0 };
  }

  add(data) {
    const time_s = data.time_unix_s;
    const last_s = this.samples.at(-1)?.time_s ?? -Infinity;
    if (time_s < last_s - SET_BACK_S) this.samples.length = this.totals.length = 0;
    else if (time_s <= last_s) return; // gateways that share the polls have clocks of their own
    this.count(data.routers);
    this.totals.push({ time_s, ...this.sums, latency: data.latency });
    const sum = (name) => data.routers.reduce((total, router) => total + router[name], 0);
    const cost_rate = this.rate("generated", COST_S);
    this.samples.push({
      time_s,
      generated: this.rate("generated", RATE_S),
      prompt: this.rate("prompt", RATE_S),
      balancedness: data.balancedness,
      hosts: data.hosts.length,
      running: sum("num_running"),
      waiting: sum("num_waiting"),
      kv_use: data.routers.length ? sum("kv_use") / data.routers.length : null,
      cost: data.price_per_hour !== null && cost_rate > 0.01 ? (data.price_per_hour / (cost_rate * 3600)) * 1e6 : null,
      ...this.latencies(data.latency),
    });
    for (const list of [this.samples, this.totals]) while (list[0].time_s < time_s - KEPT_S) list.shift();
  }

  last(name) {
    return this.samples.at(-1)?.[name] ?? null;
  }

  // Sums that only grow: a router that is new to us counts from now on, one that has gone keeps what it had.
  count(routers) {
    for (const router of routers) {
      const name = `${router.id}/${router.incarnation}`, before = this.routers.get(name);
      for (const [sum, counter] of Object.entries(COUNTERS)) {
        if (before) this.sums[sum] += Math.max(0, router[counter] - before[counter]);
      }
      this.routers.set(name, router);
    }
  }

  // The totals of `window_s` ago, or the oldest since; null while there is only one.
  before(window_s) {
    const now_s = this.totals.at(-1).time_s;
    const found = this.totals.findLast((total) => total.time_s <= now_s - window_s) ?? this.totals[0];
    return found.time_s < now_s ? found : null;
  }

  rate(name, window_s) {
    const before = this.before(window_s), now = this.totals.at(-1);
    return before && (now[name] - before[name]) / (now.time_s - before.time_s);
  }

  latencies(now) {
    const before = this.before(LATENCY_S)?.latency ?? null;
    const named = {};
    for (const [short, name] of [["first", "time_to_first_token"], ["gap", "inter_token"]]) {
      for (const share of [50, 99]) named[`${short}${share}`] = now && quantile(now[name], before?.[name] ?? null, share / 100);
    }
    return named;
  }
}

// Of what two looks at a histogram differ by, straight between the bounds; null without an observation.
export function quantile(now, before, share) {
  if (!now) return null;
  const differences = now.counts.map((value, index) => value - (before?.counts[index] ?? 0));
  const counts = differences.some((value) => value < 0) ? now.counts : differences; // a gateway began anew
  const wanted = counts.reduce((sum, value) => sum + value, 0) * share;
  if (wanted === 0) return null;
  let sum = 0;
  for (const [index, value] of counts.entries()) {
    if (value > 0 && sum + value >= wanted) {
      const low = index ? now.bounds_s[index - 1] : 0, high = now.bounds_s[index] ?? low;
      return low + (high - low) * ((wanted - sum) / value);
    }
    sum += value;
  }
  return now.bounds_s.at(-1);
}
