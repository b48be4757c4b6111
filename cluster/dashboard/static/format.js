// Numbers and times as words.

export const NONE = "–";

export function count(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  if (value >= 1e6) return `${(value / 1e6).toPrecision(3)} M`;
  if (value >= 1e4) return `${(value / 1e3).toPrecision(3)} k`;
  if (value >= 100) return Math.round(value).toLocaleString("en");
  if (value >= 10) return value.toFixed(1).replace(/\.0$/, "");
  return value === 0 ? "0" : value.toPrecision(2).replace(/\.0$/, "");
}

export function milliseconds(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds >= 10) return `${seconds.toFixed(0)} s`;
  if (seconds >= 1) return `${seconds.toFixed(1)} s`;
  if (seconds < 5e-6) return "0 ms";
  return `${seconds >= 0.01 ? Math.round(seconds * 1e3) : (seconds * 1e3).toPrecision(2)} ms`;
}

export function percent(share) {
  return share === null || share === undefined ? NONE : `${Math.round(share * 100)} %`;
}

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (number >= 1024 && power < units.length - 1) { number /= 1024; power += 1; }
  return `${number >= 100 || power === 0 ? Math.round(number) : number.toPrecision(3)} ${units[power]}`;
}

export function money(amount, currency) {
  const digits = amount >= 100 ? 0 : amount >= 0.1 ? 2 : 4;
  return new Intl.NumberFormat("en", { style: "currency", currency, minimumFractionDigits: digits, maximumFractionDigits: digits }).format(amount);
}

export function clock(unixSeconds) {
  return new Date(unixSeconds * 1e3).toLocaleTimeString("en-GB");
}

export function ago(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s ago`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min ago` : `${Math.round(seconds / 3600)} h ago`;
}

export function plural(number, word) {
  return `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
}
