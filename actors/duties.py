"""What a member owes the Coordinator, apart from devices and threads: which orders it follows, what it may drop, when it may go."""

from dataclasses import dataclass, field

from actors.exchange import HostOrders, RouterOrders
from model.logical_expert import LogicalExpert
from router.placement_map import MapVersion, PlacementMap


@dataclass
class HostDuties:
    """`desired` is what to load. Orders of an epoch below `epoch_seen` are refused: that Coordinator is not in charge any more."""

    desired: frozenset[LogicalExpert] = frozenset()
    epoch_seen: int = 0
    is_leaving: bool = False
    may_leave: bool = False
    scaling: dict[str, float] = field(default_factory=dict)

    def obey(self, orders: HostOrders, held: frozenset[LogicalExpert]) -> frozenset[LogicalExpert]:
        """What to drop of what is held: make before break, so only what no map in use names."""
        if orders.epoch < self.epoch_seen:
            return frozenset()
        self.epoch_seen = orders.epoch
        self.desired, self.may_leave, self.scaling = orders.desired, orders.may_leave, orders.scaling
        return held - orders.keep

    def to_load(self, held: frozenset[LogicalExpert], slots: int | None) -> list[LogicalExpert]:
        """What is missing and has room now. Beside its slots a host has one for staging, so that two full ones can swap."""
        missing = sorted(self.desired - held)
        return missing if slots is None else missing[: max(0, slots + 1 - len(held))]


@dataclass(frozen=True)
class LeaveLimits:
    """In seconds: Serve kills a replica `timeout_s` after it asked it to stop; `silence_s` without orders is a Coordinator gone."""

    timeout_s: float
    silence_s: float = 2.5
    margin_s: float = 2.0

    def reason_to_go(self, leaving_s: float, silent_s: float, *, may_leave: bool) -> str | None:
        """Why a host that has been leaving for `leaving_s` need not wait any longer; None while it must. `silent_s`: without orders."""
        if may_leave:
            return "no map in use names this host"
        if min(silent_s, leaving_s) >= self.silence_s:
            return f"the coordinator has been silent for {silent_s:.1f} s"
        if leaving_s >= self.timeout_s - self.margin_s:
            return f"its experts were not taken over within {leaving_s:.0f} s"
        return None


@dataclass(frozen=True)
class FinishLimits:
    """In seconds: as LeaveLimits, for a router that finishes its answers; after `settle_s` every gateway knows that it is leaving."""

    timeout_s: float
    settle_s: float
    margin_s: float = 2.0

    def reason_to_go(self, leaving_s: float, *, is_idle: bool, may_leave: bool) -> str | None:
        """Why a router that has been leaving for `leaving_s` need not wait any longer; None while it must."""
        if may_leave:
            return "the application is closing"
        if is_idle and leaving_s >= self.settle_s:
            return "its last answer is finished"
        if leaving_s >= self.timeout_s - self.margin_s:
            return f"its answers were not finished within {leaving_s:.0f} s: other routers go on with them"
        return None


@dataclass
class RouterDuties:
    """`map` is the newest that the Coordinator gave, to be adopted between two steps; lower epochs are refused."""

    map: PlacementMap | None = None
    epoch_seen: int = 0
    is_leaving: bool = False
    may_leave: bool = False
    scaling: dict[str, float] = field(default_factory=dict)

    def obey(self, orders: RouterOrders) -> bool:
        """Whether there is a newer map now."""
        if orders.epoch < self.epoch_seen:
            return False
        self.epoch_seen, self.may_leave, self.scaling = orders.epoch, orders.may_leave, orders.scaling
        if orders.map is None or (self.map is not None and orders.map.version <= self.map.version):
            return False
        self.map = orders.map
        return True

    @property
    def held(self) -> MapVersion | None:
        """The version of `map`."""
        return self.map.version if self.map else None
