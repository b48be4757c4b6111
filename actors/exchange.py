"""What members and the Coordinator tell each other: one short call about once a second, and the thread that makes it."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from actors.metrics import Sums
from model.logical_expert import LogicalExpert
from router.placement_map import Endpoint, HostKey, MapVersion, PlacementMap

logger = logging.getLogger("shoal")


@dataclass(frozen=True)
class HostReport:
    """A host's state. `failure` is a sentence when an expert cannot be loaded.

    `expert_bytes` is what one expert takes, 0 while unknown; `bytes_limit` what all may take; `speed` the load it can carry
    beside the others. `is_leaving` once Serve stops it. `epoch_seen` is the highest epoch whose orders it follows, 0 at first.
    """

    key: HostKey
    endpoint: Endpoint
    number: int  # counts this host's reports: one that was held up on its way must not replace a later one
    ready: frozenset[LogicalExpert]
    num_loading: int = 0
    slots: int | None = None
    failure: str | None = None
    stats: dict[str, float] = field(default_factory=dict)
    expert_bytes: int = 0
    bytes_limit: int | None = None
    speed: float = 1.0
    is_leaving: bool = False
    epoch_seen: int = 0
    sums: Sums = field(default_factory=dict)  # since its process began


@dataclass(frozen=True)
class HostOrders:
    """`desired` is what to load; whatever is not in `keep` may be dropped. Refused if `epoch` is below one seen before.

    `may_leave`: no router can ask this host for anything any more, or the application is closing. `scaling` are the bounds and
    signals that this replica passes on to Serve as autoscaling metrics.
    """

    desired: frozenset[LogicalExpert]
    keep: frozenset[LogicalExpert]
    epoch: int = 0
    may_leave: bool = False
    scaling: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RouterReport:
    """A router's state. `adopted` is the oldest map that anything it runs pins, `held` the newest that it was given."""

    key: HostKey
    endpoint: Endpoint
    number: int  # as in HostReport
    adopted: MapVersion | None
    suspects: tuple[HostKey, ...] = ()
    stats: dict[str, float] = field(default_factory=dict)
    expert_tokens: dict[LogicalExpert, int] = field(default_factory=dict)
    epoch_seen: int = 0
    held: MapVersion | None = None
    dead: tuple[HostKey, ...] = ()  # those of `suspects` whose process has ended: nobody listens there any more
    is_leaving: bool = False  # Serve stops it: it finishes what it has, and is to get nothing new
    sums: Sums = field(default_factory=dict)  # as in HostReport


@dataclass(frozen=True)
class RouterOrders:
    """`map` is there when it is newer than the one the router has. `epoch` and `scaling` as in HostOrders.

    `may_leave`: the application is closing, nobody waits for the rest of an answer.
    """

    map: PlacementMap | None
    epoch: int = 0
    may_leave: bool = False
    scaling: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GatewayReport:
    """What a gateway tells when it asks for the registry. `sums` as in HostReport; `gauges` are readings of now: `num_open`."""

    key: HostKey
    sums: Sums = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RouterEntry:
    """One router that gateways may use."""

    key: HostKey
    endpoint: Endpoint
    stats: dict[str, float]


@dataclass(frozen=True)
class Registry:
    """What a gateway needs: the routers that have adopted a complete map; or why none ever will.

    `is_complete` once as many have as Serve is asked to run. `scaling` as in HostOrders.
    """

    routers: tuple[RouterEntry, ...]
    is_complete: bool = False
    failure: str | None = None
    progress: str = ""
    scaling: dict[str, float] = field(default_factory=dict)


Orders = TypeVar("Orders")
CALL_TIMEOUT_S = 5.0
URGENT_S = 0.1  # between two reports of a member that needs an answer
URGENCY_CHECK_S = 0.05


def call(method: Any, *arguments: Any) -> Any:
    """One call on the Coordinator's Serve handle, cancelled if it is late, so that an outage leaves no backlog. Blocks this thread."""
    response = method.remote(*arguments)
    try:
        return response.result(timeout_s=CALL_TIMEOUT_S)
    except TimeoutError:
        response.cancel()
        raise


class Exchange(Generic[Orders]):
    """Calls the Coordinator every `interval_s` from a thread of its own; a silent Coordinator changes nothing.

    `call` makes the report and returns the orders within its own deadline, `obey` acts on them; both run on this thread. A call
    that the Coordinator held for a while counts as part of the interval. While `is_urgent` says so it calls every URGENT_S.
    """

    def __init__(
        self,
        call: Callable[[], Orders],
        obey: Callable[[Orders], Any],
        interval_s: float,
        is_urgent: Callable[[], bool] = lambda: False,
    ) -> None:
        self._call = call
        self._obey = obey
        self._is_urgent = is_urgent
        self.interval_s = interval_s
        self.answered_s = time.monotonic()  # when the Coordinator last gave orders
        self._wake = threading.Event()
        self._closed = False
        self._silent_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="exchange", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Reports now: something changed that the Coordinator should know."""
        self._wake.set()

    def close(self, timeout_s: float = 2.0) -> None:
        """Ends the thread. Idempotent."""
        self._closed = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._closed:
            started_s = time.monotonic()
            self._wake.clear()  # what changes from here on is not in the report that is made now
            self._exchange()
            self._rest(started_s)

    def _exchange(self) -> None:
        try:
            orders = self._call()
        except Exception as error:  # the Coordinator may be restarting: whatever that raises, the last orders stand
            if self._silent_since is None:
                self._silent_since = time.monotonic()
                logger.warning("coordinator silent (%s); going on with its last orders", type(error).__name__)
            return
        self.answered_s = time.monotonic()
        if self._silent_since is not None:
            logger.info("coordinator is back after %.1f s", self.answered_s - self._silent_since)
            self._silent_since = None
        try:
            self._obey(orders)
        except Exception:
            logger.exception("could not follow the coordinator's orders")

    def _rest(self, started_s: float) -> None:
        """Until the interval is over, somebody hurries, or it is urgent."""
        while not self._closed:
            now = time.monotonic()
            left_s = started_s + (min(URGENT_S, self.interval_s) if self._is_urgent() else self.interval_s) - now
            if left_s <= 0 or self._wake.wait(min(left_s, URGENCY_CHECK_S)):
                return
