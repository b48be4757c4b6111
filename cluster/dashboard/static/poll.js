// Asks the gateway each second, leaves out what is known, and says what is wrong when nothing comes.

const INTERVAL_MS = 1000, TIMEOUT_MS = 6000, LONGEST_WAIT_MS = 5000;
const KEY = "shoal-key";

export class Poll {
  // `onData(data)`, `onTrouble(sentence)` and `onKeyWanted(sentence)`, of which one is called for every try.
  constructor(onData, onTrouble, onKeyWanted) {
    Object.assign(this, { onData, onTrouble, onKeyWanted, known: null, failures: 0, timer: 0, isAsking: false });
    window.addEventListener("online", () => this.soon());
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.soon(); });
  }

  // For this tab only, and gone with it.
  useKey(key) {
    sessionStorage.setItem(KEY, key);
    this.soon();
  }

  soon() {
    clearTimeout(this.timer);
    if (!this.isAsking) this.ask();
  }

  async ask() {
    this.isAsking = true;
    try {
      await this.askOnce();
    } finally {
      this.isAsking = false;
      const wait = Math.min(LONGEST_WAIT_MS, INTERVAL_MS * 2 ** Math.min(this.failures, 4));
      this.timer = setTimeout(() => this.ask(), wait);
    }
  }

  async askOnce() {
    let response, body;
    try {
      response = await fetch(this.address(), { headers: this.headers(), cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
      body = await response.json();
    } catch (error) {
      this.failed();
      this.onTrouble(response && !response.ok ? `the gateway answers ${response.status}` : "the gateway does not answer");
      return;
    }
    if (response.ok) {
      this.failures = 0;
      this.known = { epoch: body.epoch, map_version: body.map_version, event: body.events.at(-1)?.n ?? this.eventOf(body.epoch) };
      this.onData(body);
    } else {
      this.failed();
      const sentence = body?.error?.message ?? `the gateway answers ${response.status}`;
      if (response.status === 401 || response.status === 403) this.onKeyWanted(sentence);
      else this.onTrouble(sentence);
    }
  }

  failed() {
    this.failures += 1;
    this.known = null; // who answers next may be another, and what it says is whole
  }

  eventOf(epoch) {
    return this.known?.epoch === epoch ? this.known.event : 0;
  }

  address() {
    const address = new URL("cluster/dashboard", document.baseURI);
    for (const [name, value] of Object.entries(this.known ?? {})) address.searchParams.set(name, value);
    return address;
  }

  headers() {
    const key = sessionStorage.getItem(KEY);
    return key ? { authorization: `Bearer ${key}` } : {};
  }
}
