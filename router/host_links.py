"""The channels from one router to its hosts: opened in the background, lost, opened again, retired."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from model import cpu_threads
from router.errors import ChannelRefused
from router.parts import Part
from router.placement_map import Endpoint, HostKey
from router.transport.channel import Channel
from router.transport.patient_poll import PatientPoll
from router.transport.quick_channel import QuickChannel

logger = logging.getLogger("shoal")

OpenChannel = Callable[[HostKey, Endpoint], Channel]


@dataclass(eq=False)
class Link:
    """One open channel, the parts that its host has, and the answers that still lie in its buffers; by sequence."""

    host: HostKey
    channel: Channel
    fd: int
    unanswered: dict[int, Part] = field(default_factory=dict)
    answered: dict[int, Part] = field(default_factory=dict)
    quick: QuickChannel | None = None  # the channel as machine code uses it
    is_retiring: bool = False
    is_silent: bool = False  # suspected for its silence: trusted again with the first sign of life

    @property
    def is_idle(self) -> bool:
        """Whether nothing would be missed if the channel were closed."""
        return not self.unanswered and not self.answered and not self.num_quick_tokens

    @property
    def num_quick_tokens(self) -> int:
        """Tokens that machine code has under way."""
        return 0 if self.quick is None else self.quick.num_tokens

    @property
    def is_at_work(self) -> bool:
        """Whether the host owes an answer."""
        return bool(self.unanswered or self.num_quick_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens that the host has not answered."""
        return sum(len(part.hidden) for part in self.unanswered.values()) + self.num_quick_tokens

    def copy_answers(self) -> list[int]:
        """Copies the answers out of the channel's buffers; returns the sequence numbers whose buffers are free now."""
        freed = list(self.answered)
        for part in self.answered.values():
            assert part.partial is not None
            part.partial, part.link = part.partial.clone(), None
        self.answered.clear()
        return freed


class HostLinks:
    """One thread uses it, but for `suspects` and `dead`, which any may read. `changes` counts whatever can change a choice of host.

    `open_channel` blocks for its own limited time; it runs in a thread per attempt, so a dead host delays nobody.
    """

    def __init__(self, open_channel: OpenChannel, reconnect_interval_s: float, num_cores: int | None = None) -> None:
        self._open_channel = open_channel
        self._reconnect_interval_s = reconnect_interval_s
        self._endpoints: dict[HostKey, Endpoint] = {}
        self._links: dict[HostKey, Link] = {}
        self._opening: dict[HostKey, Future[Channel]] = {}
        self._reopen_at: dict[HostKey, float] = {}
        self._was_open: set[HostKey] = set()
        self._poll = PatientPoll(num_cores)
        self._by_fd: dict[int, Link] = {}
        self.suspects: frozenset[HostKey] = frozenset()
        self.dead: frozenset[HostKey] = frozenset()
        self.changes = 0

    def adopt(self, endpoints: Mapping[HostKey, Endpoint]) -> None:
        """Opens channels to hosts that are new, retires those that are no longer named."""
        for host in [host for host in self._endpoints if host not in endpoints]:
            self._reopen_at.pop(host, None)
            self.trust(host)
            if host in self._opening:
                self._discard(self._opening.pop(host))
            if host in self._links:
                link = self._links.pop(host)
                link.is_retiring = True
                self.close_if_retired(link)
        new = [host for host in endpoints if host not in self._endpoints]
        self._endpoints = dict(endpoints)
        self.dead = self.dead.intersection(endpoints)
        self._was_open.intersection_update(endpoints)
        for host in new:
            self._open(host)
        self.changes += 1

    def refresh(self) -> None:
        """Takes over what has been opened in the background, tries lost hosts again whose time has come."""
        for host, opening in list(self._opening.items()):
            if opening.done():
                del self._opening[host]
                self._take_over(host, opening)
        if self._reopen_at:
            now = time.monotonic()
            for host in [host for host, at in self._reopen_at.items() if at <= now]:
                del self._reopen_at[host]
                self._open(host)

    def get(self, host: HostKey) -> Link | None:
        """The open link to a host of the map, if there is one."""
        return self._links.get(host)

    def is_reachable(self, host: HostKey) -> bool:
        """Whether there is a channel, or a first one is being opened."""
        return host in self._links or (host in self._opening and host not in self.suspects)

    def poll(self, timeout_s: float) -> list[Link]:
        """The links that may have an answer; waits for the first of them."""
        num_working = self._count(link for link in self._by_fd.values() if link.is_at_work)
        return [self._by_fd[fd] for fd in self._poll.wait(timeout_s, num_working)]

    def look_s(self, num_working: int) -> float:
        """How long to stay awake for the first answer of so many hosts."""
        return self._poll.look_s(num_working)

    def note_wait(self, num_working: int, waited_s: float) -> None:
        """So long it took, waited for elsewhere."""
        self._poll.note(num_working, waited_s)

    def rest_helpers(self) -> None:
        """Sends this process' helpers to sleep until the next job, where a host of this node is to be woken.

        While they look for jobs it finds no core but the waker's, and what is sent to the next host waits for it.
        """
        if any(link.channel.is_on_node for link in self._by_fd.values()):
            cpu_threads.rest()

    def lend_cores_to(self, num_hosts: int) -> None:
        """The same where it is known how many there are, all of this node."""
        cpu_threads.lend(min(num_hosts, self._poll.num_cores), self._poll.num_cores)

    def lend_cores(self) -> None:
        """Each host of this node that is at work has a core of those that this process would compute on."""
        num_here = self._count(link for link in self._by_fd.values() if link.is_at_work and link.channel.is_on_node)
        cpu_threads.lend(num_here, self._poll.num_cores)

    def _count(self, links: Iterable[Link]) -> int:
        """No more than it takes to know that not all can have a core."""
        return sum(1 for _ in itertools.islice(links, self._poll.num_cores + 1))

    def waited_for(self) -> list[Link]:
        """All links that owe an answer."""
        return [link for link in self._by_fd.values() if link.unanswered]

    def suspect(self, host: HostKey) -> None:
        """The host broke a channel or a deadline: taken last, and reported, until it answers or is reached again."""
        if host in self._endpoints and host not in self.suspects:
            self.suspects |= {host}
            self.changes += 1

    def trust(self, host: HostKey) -> None:
        """The host answered."""
        if host in self.suspects:
            self.suspects -= {host}
            self.changes += 1

    def miss(self, link: Link) -> None:
        """The host has left a heartbeat unanswered: suspect until it is heard of. Its channel stays open."""
        if not link.is_silent:
            logger.warning("expert host %s (incarnation %d) is silent", link.host.replica_id, link.host.incarnation)
            link.is_silent = True
            self.suspect(link.host)

    def hear(self, link: Link) -> None:
        """A host that was silent has answered, be it a heartbeat only."""
        logger.info("expert host %s (incarnation %d) is heard again", link.host.replica_id, link.host.incarnation)
        link.is_silent = False
        self.trust(link.host)

    def lose(self, link: Link, reason: str) -> list[Part]:
        """Closes a broken channel and begins to open another one; returns the parts that it had no answer to.

        Answers that lie in its buffers are copied first.
        """
        link.copy_answers()
        lost = list(link.unanswered.values())
        for part in lost:
            part.link = None
        link.unanswered.clear()
        self._close(link)
        if self._links.get(link.host) is link:
            logger.warning("lost expert host %s (incarnation %d): %s", link.host.replica_id, link.host.incarnation, reason)
            del self._links[link.host]
            self._reopen_at[link.host] = 0.0
            self.suspect(link.host)
            self.changes += 1
        return lost

    def close_if_retired(self, link: Link) -> None:
        """Closes the channel of a host that no map names any more, once nothing is on its way."""
        if link.is_retiring and link.is_idle:
            self._close(link)

    def close(self) -> None:
        """Closes everything. Idempotent."""
        for opening in self._opening.values():
            self._discard(opening)
        for link in list(self._by_fd.values()):
            self._close(link)
        self._opening.clear()
        self._links.clear()
        self._reopen_at.clear()
        self._endpoints.clear()
        self.suspects = self.dead = frozenset()

    def _open(self, host: HostKey) -> None:
        endpoint = self._endpoints[host]
        opening: Future[Channel] = Future()

        def run() -> None:
            try:
                channel = self._open_channel(host, endpoint)
            except Exception as error:
                if opening.set_running_or_notify_cancel():
                    opening.set_exception(error)
                return
            if opening.set_running_or_notify_cancel():
                opening.set_result(channel)
            else:
                channel.close()

        self._opening[host] = opening
        threading.Thread(target=run, name=f"open-{host.replica_id}", daemon=True).start()

    def _take_over(self, host: HostKey, opening: "Future[Channel]") -> None:
        try:
            channel = opening.result()
        except Exception as error:
            if host not in self.suspects:
                logger.warning("cannot reach expert host %s (incarnation %d): %s", host.replica_id, host.incarnation, error)
            if isinstance(error, ChannelRefused) and host in self._was_open:
                self.dead |= {host}
            self.suspect(host)
            self._reopen_at[host] = time.monotonic() + self._reconnect_interval_s
            return
        self._was_open.add(host)
        self.dead -= {host}
        link = Link(host, channel, channel.fileno(), quick=QuickChannel.of(channel))
        self._links[host] = link
        self._by_fd[link.fd] = link
        self._poll.register(link.fd)
        self.trust(host)
        self.changes += 1

    def _close(self, link: Link) -> None:
        if self._by_fd.get(link.fd) is link:
            del self._by_fd[link.fd]
            self._poll.unregister(link.fd)
        link.channel.close()

    @staticmethod
    def _discard(opening: "Future[Channel]") -> None:
        if not opening.cancel() and opening.exception() is None:
            opening.result().close()
