"""Bounds of scaling that an operator sets while the application runs; members carry them to Serve's policies."""

import math
from collections.abc import Callable, Iterable, Mapping

from cluster.operations import BadBounds
from router.placement_map import HostKey

ROLES = ("expert_host", "router", "gateway")
KEYS = ("min_replicas", "max_replicas")


class RunTimeBounds:
    """By role, {"expert_host": {"min_replicas": 2.0}}; none at first. `version` is when they were set, seconds since 1970."""

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self.by_role: dict[str, dict[str, float]] = {}
        self.version = 0.0
        self._told: dict[HostKey, float] = {}

    def set(self, bounds: Mapping[str, Mapping[str, float]]) -> None:
        """Replaces the bounds of the roles that are named; a role's empty bounds bring back the configured ones. Raises BadBounds."""
        checked = {role: _checked(role, its) for role, its in bounds.items()}
        after = {role: its for role, its in {**self.by_role, **checked}.items() if its}
        if after != self.by_role:
            self.by_role = after
            self.version = max(self._wall_clock(), self.version + 0.001)

    def restore(self, bounds: Mapping[str, Mapping[str, float]]) -> None:
        """Those of an earlier Coordinator; what makes no sense any more is left out."""
        self.by_role = {role: dict(its) for role, its in bounds.items() if role in ROLES}
        self.version = self._wall_clock() if self.by_role else 0.0

    def orders(self, role: str, key: HostKey | None = None) -> dict[str, float]:
        """For a member of this role, which counts as told: `scaling_min`, `scaling_max`, `scaling_version`."""
        if key is not None:
            self._told[key] = self.version
        if not self.version:
            return {}
        its = self.by_role.get(role, {})
        names = {"min_replicas": "scaling_min", "max_replicas": "scaling_max"}
        return {names[key]: bound for key, bound in its.items()} | {"scaling_version": self.version}

    def are_told(self, keys: Iterable[HostKey]) -> bool:
        """Whether all of these have had the latest; forgets the others."""
        self._told = {key: self._told.get(key, -1.0) for key in keys}
        return all(version == self.version for version in self._told.values())

    def as_text(self) -> str:
        """One line."""
        lines = (f"{role}.{key} = {bound:g}" for role, its in sorted(self.by_role.items()) for key, bound in sorted(its.items()))
        return ", ".join(lines) or "as configured"


def _checked(role: str, bounds: Mapping[str, float]) -> dict[str, float]:
    if role not in ROLES:
        raise BadBounds(f"{role!r} is no role that scales: {', '.join(ROLES)}")
    checked = {}
    for key, bound in bounds.items():
        if key not in KEYS:
            raise BadBounds(f"{role}.{key!s} cannot be set at run time: only {' and '.join(KEYS)} can")
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound) or bound < 1 or bound != int(bound):
            raise BadBounds(f"{role}.{key} is {bound!r}, but must be a whole number, 1 or more")
        checked[key] = float(bound)
    if checked.get("min_replicas", 1.0) > checked.get("max_replicas", math.inf):
        raise BadBounds(f"{role}.min_replicas is above {role}.max_replicas")
    return checked
