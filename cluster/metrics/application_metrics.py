"""The Coordinator's side of `/metrics`: takes what members have counted, and shows the whole application."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from actors.exchange import GatewayReport
from actors.metrics import Series
from cluster.metrics.ledger import SumsLedger
from cluster.metrics.snapshot import Snapshot, take_snapshot
from router.placement_map import HostKey

if TYPE_CHECKING:
    from cluster.coordinator import Coordinator


class ApplicationMetrics:
    """One thread calls it. Times are seconds on the caller's clock; a gateway that is silent for `lease_s` shows no gauges any more."""

    def __init__(self, model_name: str, lease_s: float) -> None:
        self._model_name = model_name
        self._lease_s = lease_s
        self._ledger = SumsLedger()
        self._gateways: dict[HostKey, tuple[float, GatewayReport]] = {}

    def hear(self, member: object, sums: Mapping[Series, float]) -> None:
        """What a router, a host or whoever else has counted since it began. `member` is one life of one process."""
        self._ledger.take(member, sums)

    def hear_gateway(self, report: GatewayReport, now_s: float) -> None:
        """As `hear`, and how many answers the gateway has under way."""
        self._ledger.take(report.key, report.sums)
        self._gateways[report.key] = (now_s, report)

    @property
    def totals(self) -> Mapping[Series, float]:
        """All that members have counted, those that are gone included."""
        return self._ledger.totals

    def snapshot(self, coordinator: "Coordinator", now_s: float) -> Snapshot:
        """Everything at this moment."""
        self._gateways = {key: heard for key, heard in self._gateways.items() if now_s - heard[0] <= self._lease_s}
        gateways = {key.replica_id: report.gauges for key, (_, report) in self._gateways.items()}
        return take_snapshot(coordinator, self._model_name, self._ledger.totals, gateways, now_s)
