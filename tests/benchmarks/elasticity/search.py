"""The cheapest fleet of each kind that meets the targets, found by trying; fixed and elastic are chosen with the same hindsight."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from cluster.autoscaling import Bounds
from tests.benchmarks.elasticity.constants import Constants
from tests.benchmarks.elasticity.fleet import Outcome, Replay, Shape
from tests.benchmarks.elasticity.hosts import ExpertHosts
from tests.benchmarks.elasticity.requests import Requests

UNITS = ((1, 2), (2, 3))  # routers and hosts of one unit
PATIENCE = 4  # routers more in a row that save no host
SHARES = 10  # bounds below are tried in tenths of the fixed fleet, then one by one


@dataclass(frozen=True)
class Found:
    """The fleet, and its replay."""

    shape: Shape
    outcome: Outcome


class Search:
    """Remembers what it has tried. `say` gets a line for each replay."""

    def __init__(self, constants: Constants, hosts: ExpertHosts, requests: Requests, say: Callable[[str], None] = lambda _: None) -> None:
        self._constants, self._hosts, self._requests, self._say = constants, hosts, requests, say
        self._tried: dict[Shape, Outcome] = {}

    def play(self, shape: Shape) -> Outcome:
        """Its replay, cut short where it fails."""
        if shape not in self._tried:
            outcome = self._tried[shape] = Replay(self._constants, self._hosts, self._requests, shape).run(whole=False)
            self._say(
                f"routers {shape.routers.min}-{shape.routers.max} hosts {shape.hosts.min}-{shape.hosts.max} unit {shape.unit}: "
                + (f"{outcome.hours:.0f} h, TTFT {outcome.ttft_p99_s:.2f} s, TPOT {outcome.tpot_p99_s:.3f} s" if outcome.is_met else "late")
            )
        return self._tried[shape]

    def fixed(self, most: int = 64) -> Found:
        """Fewest nodes. For each number of routers, beginning with the fewest that can do: hosts so few that the fleet is smaller."""
        routers = self._smallest(lambda routers: _fixed(routers, most), 1, most)
        best, worse = _fixed(routers, self._smallest(lambda hosts: _fixed(routers, hosts), 1, most)), 0
        while worse < PATIENCE:
            routers += 1
            hosts = best.routers.min + best.hosts.min - 1 - routers
            if self.play(_fixed(routers, hosts)).is_met:
                low = max(1, hosts - 8)
                best, worse = _fixed(routers, self._smallest(lambda hosts, routers=routers: _fixed(routers, hosts), low, hosts)), 0
            else:
                worse += 1
        # What meets the targets by a hair is not monotone: no mix of one node less near the best is left untried.
        while better := next((shape for shape in _one_node_less(best) if self.play(shape).is_met), None):
            best = better
        return self._found(best)

    def elastic(self, fixed: Shape) -> Found:
        """Least hours over bounds below, each role with its own policy."""

        def shape(routers: int, hosts: int) -> Shape:
            policy = self._constants.policy
            most_routers, most_hosts = ceil(policy.most_routers * fixed.routers.max), ceil(policy.most_hosts * fixed.hosts.max)
            return Shape(Bounds(min(routers, most_routers), most_routers), Bounds(min(hosts, most_hosts), most_hosts))

        def of_share(tenths: int) -> Shape:
            return shape(ceil(fixed.routers.max * tenths / SHARES), ceil(fixed.hosts.max * tenths / SHARES))

        start = of_share(self._smallest(of_share, 1, SHARES))
        routers, hosts = start.routers.min, start.hosts.min
        while routers > 1 and self.play(shape(routers - 1, hosts)).is_met:
            routers -= 1
        while hosts > 1 and self.play(shape(routers, hosts - 1)).is_met:
            hosts -= 1
        met = [tried for tried, outcome in self._tried.items() if outcome.is_met and not tried.is_fixed and tried.unit is None]
        return self._found(min(met, key=lambda tried: self._tried[tried].hours, default=start))

    def as_one_unit(self, fixed: Shape) -> Found:
        """Least hours where routers and hosts come and go together, in the ratio that suits best."""
        policy = self._constants.policy
        best: Shape | None = None
        for unit in UNITS:
            most = max(ceil(policy.most_routers * fixed.routers.max / unit[0]), ceil(policy.most_hosts * fixed.hosts.max / unit[1]))

            def shape(units: int, unit: tuple[int, int] = unit, most: int = most) -> Shape:
                return Shape(Bounds(unit[0] * units, unit[0] * most), Bounds(unit[1] * units, unit[1] * most), unit)

            found = shape(self._smallest(shape, 1, most))
            if self.play(found).is_met and (best is None or self.play(found).hours < self.play(best).hours):
                best = found
        if best is None:
            raise ValueError("no number of units meets the targets")
        return self._found(best)

    def _smallest(self, shape: Callable[[int], Shape], low: int, high: int) -> int:
        """The smallest number whose shape meets the targets, by halving; `high` where none does."""
        while low < high:
            middle = (low + high) // 2
            if self.play(shape(middle)).is_met:
                high = middle
            else:
                low = middle + 1
        return low

    def _found(self, shape: Shape) -> Found:
        return Found(shape, self.play(shape))


def _one_node_less(shape: Shape) -> list[Shape]:
    routers, nodes = shape.routers.min, shape.routers.min + shape.hosts.min - 1
    return [_fixed(count, nodes - count) for count in range(max(1, routers - 2), routers + 3) if nodes > count]


def _fixed(routers: int, hosts: int) -> Shape:
    return Shape(Bounds(routers, routers), Bounds(hosts, hosts))
