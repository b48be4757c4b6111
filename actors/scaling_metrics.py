"""What replicas tell Serve's autoscaler: plain numbers, from what hosts and routers count anyway.

A name that is missing means "not known", which the policies tell apart from zero.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Literal, get_args

Reader = Literal["report", "scaling"]


def host_metrics(
    stats: Mapping[str, float],
    interval_s: float,
    num_ready: int,
    slots: int | None,
    scaling: Mapping[str, float],
    expert_bytes: int = 0,
    bytes_limit: int | None = None,
) -> dict[str, float]:
    """`stats`: an ExpertServer's sums over `interval_s`; `scaling`: the Coordinator's bounds, passed on under their own names.

    `busy` is a share of the interval, `queue_wait_s` the mean over the interval's frames (missing without a frame), `slots` the
    experts that fit by number and by bytes (missing without a limit).
    """
    metrics = {**scaling, "ready": float(num_ready)}
    if interval_s > 0:
        metrics["busy"] = min(1.0, stats.get("busy_s", 0.0) / interval_s)
    num_frames = stats.get("num_frames", 0.0)
    if num_frames > 0:
        metrics["queue_wait_s"] = stats.get("queue_wait_s", 0.0) / num_frames
    by_bytes = bytes_limit // expert_bytes if bytes_limit is not None and expert_bytes > 0 else None
    limits = [limit for limit in (slots, by_bytes) if limit is not None]
    if limits:
        metrics["slots"] = float(min(limits))
    return metrics


def router_metrics(
    load: Mapping[str, float], scaling: Mapping[str, float], busy_s: float | None = None, interval_s: float = 0.0
) -> dict[str, float]:
    """`load`: an EngineLoad as a dict; `busy_s`: time spent in steps during the last `interval_s`, None where it is not measured."""
    names = ("kv_use", "num_running", "num_waiting", "num_waiting_tokens")
    metrics = {**scaling, **{name: load[name] for name in names if name in load}}
    if busy_s is not None and interval_s > 0:
        metrics["busy"] = min(1.0, busy_s / interval_s)
    return metrics


class SharedSums:
    """One source of sums "since the last call", read by two readers who each want all of it: reports and the autoscaler.

    Any thread. `clock` is monotonic, in seconds.
    """

    def __init__(
        self, take: Callable[[], Mapping[str, float]], clock: Callable[[], float], gauges: frozenset[str] = frozenset({"queued_tokens"})
    ) -> None:
        self._take = take
        self._clock = clock
        self._gauges = gauges  # what is a reading and not a sum
        self._lock = threading.Lock()
        self._sums: dict[Reader, dict[str, float]] = {reader: {} for reader in get_args(Reader)}
        self._read_s: dict[Reader, float] = dict.fromkeys(self._sums, clock())

    def take(self, reader: Reader) -> tuple[dict[str, float], float]:
        """The sums since this reader's last call, and the seconds that they cover."""
        with self._lock:
            now_s = self._clock()
            taken = self._take()
            for sums in self._sums.values():
                for name, value in taken.items():
                    sums[name] = value if name in self._gauges else sums.get(name, 0.0) + value
            mine, self._sums[reader] = self._sums[reader], {}
            interval_s, self._read_s[reader] = now_s - self._read_s[reader], now_s
            return mine, interval_s
