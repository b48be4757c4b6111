"""Who is alive: hosts and routers under their leases, what they last said, and which hosts routers cannot reach."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from actors.exchange import HostReport, RouterReport
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey, MapVersion


@dataclass
class HostMember:
    """`ready` is what the host holds for certain until it is heard again: what it reported, less what it may have dropped since."""

    report: HostReport
    heard_s: float
    ready: frozenset[LogicalExpert]


@dataclass
class RouterMember:
    """`handed` is the map that went out in reply to the last report: the router may or may not have got it."""

    report: RouterReport
    heard_s: float
    handed: MapVersion | None = None


Member = TypeVar("Member", HostMember, RouterMember)


@dataclass
class _Leases(Generic[Member]):
    """Members by key, and the numbers of the last reports of those that are gone: a late report must not bring one back."""

    live: dict[HostKey, Member] = field(default_factory=dict)
    gone: dict[HostKey, int] = field(default_factory=dict)

    def is_news(self, report: HostReport | RouterReport) -> bool:
        known = self.live.get(report.key)
        last = known.report.number if known is not None else self.gone.get(report.key, -1)
        return report.number > last

    def end(self, key: HostKey) -> None:
        self.gone[key] = self.live.pop(key).report.number
        while len(self.gone) > 1024:
            del self.gone[next(iter(self.gone))]


class Members:
    """The Coordinator's registry. Times are seconds on its clock.

    A host that a router suspects has half a lease: whoever hears it need not wait, and whoever does not has two witnesses.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._hosts = _Leases[HostMember]()
        self._routers = _Leases[RouterMember]()
        self._suspected_since: dict[HostKey, float] = {}

    @property
    def hosts(self) -> dict[HostKey, HostMember]:
        """Those whose lease runs."""
        return self._hosts.live

    @property
    def routers(self) -> dict[HostKey, RouterMember]:
        """Those whose lease runs."""
        return self._routers.live

    def hear_host(self, report: HostReport, now_s: float) -> HostMember | None:
        """Notes a report and renews the lease; None for a report that was overtaken by a later one."""
        if not self._hosts.is_news(report):
            return None
        member = HostMember(report, now_s, report.ready)
        self._hosts.live[report.key] = member
        return member

    def hear_router(self, report: RouterReport, now_s: float) -> RouterMember | None:
        """As `hear_host`."""
        if not self._routers.is_news(report):
            return None
        member = RouterMember(report, now_s)
        self._routers.live[report.key] = member
        self._note_suspects(now_s)
        return member

    def lapsed_hosts(self, now_s: float) -> dict[HostKey, float]:
        """Hosts whose lease is over, and how long they have been silent."""
        silent = {key: now_s - member.heard_s for key, member in self.hosts.items()}
        return {key: silence_s for key, silence_s in silent.items() if silence_s > self._lease_of(key)}

    def lapsed_routers(self, now_s: float) -> dict[HostKey, float]:
        """As `lapsed_hosts`."""
        silent = {key: now_s - member.heard_s for key, member in self.routers.items()}
        return {key: silence_s for key, silence_s in silent.items() if silence_s > self._lease_s}

    def end_host(self, key: HostKey) -> None:
        """Its lease is over."""
        self._hosts.end(key)
        self._suspected_since.pop(key, None)

    def end_router(self, key: HostKey, now_s: float) -> None:
        """Its lease is over, and so are its suspicions."""
        self._routers.end(key)
        self._note_suspects(now_s)

    def suspected_for(self, now_s: float) -> dict[HostKey, float]:
        """Hosts that a live router cannot reach, and for how long it has said so. A hint: the host may be well."""
        return {key: now_s - since for key, since in self._suspected_since.items()}

    @property
    def dead(self) -> set[HostKey]:
        """Suspected hosts at whose address nobody listens any more: no need to wait whether they come back."""
        return {host for router in self.routers.values() for host in router.report.dead if host in self._suspected_since}

    def renew_all(self, now_s: float) -> None:
        """It was the Coordinator that was away: nobody's silence counts."""
        for host in self.hosts.values():
            host.heard_s = now_s
        for router in self.routers.values():
            router.heard_s = now_s

    def epochs_seen(self) -> Iterable[int]:
        """Of all members."""
        yield from (host.report.epoch_seen for host in self.hosts.values())
        yield from (router.report.epoch_seen for router in self.routers.values())

    def _lease_of(self, key: HostKey) -> float:
        return self._lease_s / 2 if key in self._suspected_since else self._lease_s

    def _note_suspects(self, now_s: float) -> None:
        suspects = {host for router in self.routers.values() for host in router.report.suspects if host in self.hosts}
        self._suspected_since = {host: self._suspected_since.get(host, now_s) for host in suspects}
