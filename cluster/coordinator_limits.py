"""The Coordinator's settings as one value."""

from dataclasses import dataclass, field

from cluster.placement import PlannerSettings


@dataclass(frozen=True)
class CoordinatorLimits:
    """Times in seconds; `num_hosts` and `num_routers` are how many Serve is asked to run at the start.

    A lost host's replacement is waited for `orphan_grace_s`; experts that no reachable host holds wait only `rescue_grace_s`,
    in which a channel that merely broke is open again. Every `rebalance_interval_s` the planner may move what pays. While replicas
    load and nothing is amiss, maps are published `publish_interval_s` apart.
    """

    num_hosts: int
    num_routers: int
    lease_s: float = 5.0
    orphan_grace_s: float = 20.0
    rescue_grace_s: float = 0.5
    rebalance_interval_s: float = 30.0
    publish_interval_s: float = 0.5
    operation_timeout_s: float = 600.0
    short_window_s: float = 5.0
    long_window_s: float = 60.0
    planner: PlannerSettings = field(default_factory=PlannerSettings)
