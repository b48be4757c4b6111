"""What a member has counted since it began, by series: told anew with every report, so that a lost report loses nothing.

A series is a metric's name without the prefix `shoal_`, and its label values in the order of `cluster.metrics.catalogue`. All of them
only ever grow. A histogram is one series a bucket, (name, "0"), (name, "1"), ..., and (name, "sum").
"""

from collections.abc import Mapping

from router.histogram import Histogram

Series = tuple[str, ...]
Sums = dict[Series, float]
SUM = "sum"

_HOST_COUNTERS: dict[str, Series] = {
    "num_calls": ("host_calls_total",),
    "num_tokens": ("host_tokens_total",),
    "busy_s": ("host_busy_seconds_total",),
    "queue_wait_s": ("dispatch_queue_wait_seconds", SUM),
    "num_frames": ("dispatch_queue_wait_seconds", "count"),
    "num_busy": ("host_refused_frames_total", "busy"),
    "num_not_here": ("host_refused_frames_total", "not_here"),
    "num_failed": ("host_refused_frames_total", "failed"),
    "num_cancelled": ("host_refused_frames_total", "cancelled"),
}
_ENGINE_COUNTERS: dict[str, Series] = {
    "num_steps": ("router_steps_total",),
    "num_split_steps": ("router_split_steps_total",),
    "num_prefill_tokens": ("router_prefill_tokens_total",),
    "num_generated_tokens": ("router_generated_tokens_total",),
    "num_preemptions": ("num_preemptions_total",),
}


def histogram_sums(name: str, histogram: Histogram) -> Sums:
    """A histogram's series; buckets that are empty are left out."""
    sums: Sums = {(name, str(index)): float(count) for index, count in enumerate(histogram.counts) if count}
    sums[name, SUM] = histogram.total
    return sums


def router_sums(load: Mapping[str, float], step_s: float, num_frames: int, resends: Mapping[str, int], queue_time: Histogram) -> Sums:
    """`load`: an EngineLoad as a dict; `step_s`: seconds spent in steps; `resends`: parts that went out anew, by reason."""
    sums: Sums = {series: load[name] for name, series in _ENGINE_COUNTERS.items() if name in load}
    sums["router_step_seconds_total",] = step_s
    sums["dispatch_frames_total",] = float(num_frames)
    sums |= {("dispatch_resends_total", reason): float(count) for reason, count in resends.items()}
    return sums | histogram_sums("request_queue_time_seconds", queue_time)


class HostSums:
    """An ExpertServer's stats come as what was done since the last look: here they are added up."""

    def __init__(self) -> None:
        self._sums: Sums = dict.fromkeys(_HOST_COUNTERS.values(), 0.0)

    def add(self, stats: Mapping[str, float]) -> Sums:
        """Adds what a host did since the last call; all that it has done."""
        for name, series in _HOST_COUNTERS.items():
            self._sums[series] += stats.get(name, 0.0)
        return dict(self._sums)
