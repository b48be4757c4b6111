"""Dispatch and combine over hosts: group a batch by host, send, add up what comes back, resend what does not."""

import logging
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from model.gate import Routing
from model.logical_expert import LogicalExpert
from router.dispatch_limits import DispatchLimits
from router.errors import BatchAtFault, ChannelError, ChannelFull, ExpertsUnavailable, FrameError, PoisonedBatch
from router.expert_load import ExpertLoad
from router.grouping import NOBODY
from router.host_links import HostLinks, Link, OpenChannel
from router.parts import BatchHandle, HostGroup, Part, group_by_host
from router.placement_map import HostKey, MapVersion, PlacementMap
from router.quick_batches import QuickBatches
from router.replica_tables import ReplicaTables
from router.transport.frames import ExpertsAnswer, ExpertsRequest, FrameKind
from router.transport.quick_hop import IS_SENT

__all__ = ["DispatchLimits", "DistributedExperts"]

logger = logging.getLogger("shoal")

_CPU = torch.device("cpu")


class DistributedExperts:
    """Experts on hosts, for one engine thread; `take_load`, `suspects`, `dead_hosts` and `acknowledged` may be read from any other.

    `latest_map` gives the newest map that has been published: a batch whose expert has no live host waits for it.
    """

    def __init__(
        self,
        open_channel: OpenChannel,
        latest_map: Callable[[], PlacementMap | None] = lambda: None,
        limits: DispatchLimits | None = None,
    ) -> None:
        self.limits = limits or DispatchLimits()
        self._latest_map = latest_map
        self._links = HostLinks(open_channel, self.limits.reconnect_interval_s, self.limits.num_cores)
        self._tables = ReplicaTables(self._links)
        self._quick = QuickBatches(self._links, self._tables, self.limits.decode_tokens)
        self._load = ExpertLoad()
        self._map: PlacementMap | None = None
        self._refused: tuple[MapVersion, int] | None = None
        self._open_handles: set[BatchHandle] = set()
        self._next_sequence = 1
        self._num_resent = 0
        self.num_frames = 0  # sent since the start
        self.num_by_trouble: Counter[str] = Counter()  # parts that could not be sent, or had to go out anew, by why
        self.acknowledged: MapVersion | None = None

    # -- the map

    def adopt(self, placement: PlacementMap) -> bool:
        """Takes a newer map; call it between two steps. Opens channels to new hosts without waiting for them.

        False, and nothing changes, for an older map or one that names no host for an expert that the old one still reaches.
        """
        old = self._map
        if old is not None and placement.version == old.version:
            return True
        self._settle()
        # Asked again every step: looked at again only when a host has come or gone since.
        if self._refused == (placement.version, self._links.changes):
            return False
        reason = self._reason_to_refuse(placement)
        if reason:
            if self._refused is None or self._refused[0] != placement.version:
                logger.warning("refused map %d.%d: %s", *placement.version, reason)
            self._refused = (placement.version, self._links.changes)
            return False
        self._map, self._refused = placement, None
        self._links.adopt(placement.hosts)
        self._tables.adopt(placement)
        self._acknowledge()
        return True

    @property
    def suspects(self) -> frozenset[HostKey]:
        """Hosts of the map that broke a channel, a heartbeat or a deadline and have not answered since."""
        return self._links.suspects

    @property
    def dead_hosts(self) -> frozenset[HostKey]:
        """Suspects whose process has ended: the channel broke, and nobody listens at their address any more."""
        return self._links.dead

    def take_load(self) -> dict[LogicalExpert, int]:
        """Tokens routed to each expert since the last call; those with none are left out."""
        return self._load.take()

    def close(self) -> None:
        """Gives up whatever is open and closes all channels. Idempotent."""
        for handle in list(self._open_handles):
            self.abandon(handle)
        self._links.close()

    # -- the token path

    def dispatch(self, layer: int, hidden: Tensor, routing: Routing) -> BatchHandle:
        """Sends hidden [T, H] to the hosts of its chosen experts; `hidden` must stay as it is until `combine`, for a resend.

        What cannot be sent now (no host, no buffer) is sent by `combine`. ExpertsUnavailable before the first map.
        """
        if self._map is None:
            raise ExpertsUnavailable("no placement map has been adopted yet: no expert can be reached")
        self._links.refresh()
        if self._links.suspects:  # machine code reads from none of them: has one been heard of?
            self._settle()
            self._collect(0.0)
        now = time.monotonic()
        deadline = now + self.limits.step_timeout_s
        look_at = min(now + self.limits.look_interval_s, deadline)
        num_experts = self._tables.num_experts
        handle = BatchHandle(layer, num_experts, hidden.shape, hidden.dtype, hidden.device, self._map.version, deadline, look_at)
        self._open_handles.add(handle)
        try:
            if not len(hidden) or not self._send_quickly(handle, hidden, routing):
                self._settle()
                expert_ids = routing.expert_ids.to(_CPU, torch.int16).contiguous()
                handle.num_experts = self._load.count(layer, expert_ids.numpy(), num_experts)
                if len(hidden):
                    weights = routing.weights.detach().to(_CPU, torch.float32)
                    self._place(Part(handle, None, hidden.detach().to(_CPU), expert_ids, weights))
        except BaseException:
            self.abandon(handle)
            raise
        if handle.quick is not None and len(self._open_handles) == 1:
            self._links.lend_cores_to(handle.quick.num_frames)
        else:
            self._links.lend_cores()
        return handle

    def combine(self, handle: object) -> Tensor:
        """Waits for every answer to the batch; the sum over each token's experts, [T, H] in hidden's dtype.

        Raises ExpertsUnavailable, naming the experts and why: no ready replica answered within the step's time-out; BatchAtFault
        if it failed twice, PoisonedBatch if it killed its hosts. The handle is used up either way.
        """
        assert isinstance(handle, BatchHandle)
        assert handle in self._open_handles, "a handle is combined once"
        try:
            if handle.quick is not None:
                total = self._quick.collect(handle, handle.quick, handle.look_at - time.monotonic())
                if total is not None:
                    handle.quick = None
                    return total
            self._settle()
            while handle.is_open and handle.error is None:
                for each in [each for each in self._open_handles if each.waiting]:  # another micro-batch's too
                    self._place_waiting(each)
                self._collect(self._patience_s(handle))
                if handle.is_open and time.monotonic() >= handle.look_at:
                    self._look_after(handle)
            if handle.error is not None:
                raise handle.error
            return handle.total()
        finally:
            self.abandon(handle)

    def abandon(self, handle: object) -> None:
        """Gives back what the batch holds: for one that nobody will combine. Idempotent."""
        assert isinstance(handle, BatchHandle)
        if handle.quick is not None:
            self._settle()
        for part in list(handle.sent.values()):
            self._give_up(part)
        for part in handle.answered:
            if part.link is not None:
                self._release(part.link, part.sequence)
        handle.waiting.clear()
        self._open_handles.discard(handle)
        self._acknowledge()
        self._links.lend_cores()

    # -- the quick way

    def _send_quickly(self, handle: BatchHandle, hidden: Tensor, routing: Routing) -> bool:
        """Whether machine code has sent the batch; then it is its own until it is complete, or settled."""
        batch = self._quick.send(handle, hidden, routing.expert_ids, routing.weights, self._next_sequence, self._load)
        if batch is None:
            return False
        handle.quick = batch
        self._next_sequence += len(batch.frames)
        if batch.num_frames < 0:
            self.num_frames += int(batch.frames[:, IS_SENT].sum())
            self._settle()
        else:
            self.num_frames += batch.num_frames
        return True

    def _settle(self) -> None:
        """Makes all batches ordinary ones: before anything is read or lost that may be an answer to them."""
        self._quick.mistrust()
        received: list[tuple[Link, int]] = []
        for handle in [handle for handle in self._open_handles if handle.quick is not None]:
            assert handle.quick is not None
            settled = self._quick.settle(handle, handle.quick)
            handle.quick = None
            received += settled.received
            for part in settled.unsent:
                self._wait(part, 0.0)
        for link, num_bytes in received:
            assert link.quick is not None
            try:
                link.quick.take(num_bytes)
            except ChannelError as error:
                self._lose(link, str(error))

    # -- sending and receiving

    def _place(self, part: Part) -> None:
        """Sends the part to the hosts of its experts, split by host; what has none waits."""
        self._links.rest_helpers()
        for group in group_by_host(part.expert_ids, self._tables.host_table(part), len(self._tables.hosts)):
            piece = part.take(group)
            if group.host == NOBODY:
                if piece.trouble is None:
                    piece.met("no host that holds them can be reached")
                    self.num_by_trouble["no_host"] += 1
                self._wait(piece, self.limits.retry_interval_s)
            else:
                self._send(piece, self._tables.hosts[group.host])

    def _send(self, part: Part, host: HostKey) -> None:
        link = self._links.get(host)
        if link is None:  # lost while another part of this batch was sent
            self._wait(part, 0.0)
            return
        assert self._map is not None
        is_prefill = len(part.hidden) > self.limits.decode_tokens
        request = ExpertsRequest(part.handle.layer, self._map.version, part.hidden, part.expert_ids, part.weights, is_prefill)
        part.host, part.version, part.sequence = host, self._map.version, self._next_sequence
        self._next_sequence += 1
        part.attempt += 1
        try:
            link.channel.send(part.sequence, part.attempt, request)
        except ChannelFull as error:
            if link.is_idle:  # every buffer was set aside after a time-out: this channel has served its time
                self._lose(link, str(error))
            for sequence in link.copy_answers():  # another micro-batch may hold them until after this one
                self._release(link, sequence)
            self.num_by_trouble["channel_full"] += 1
            self._back_off(part, f"the channel to host {host.replica_id} is full")
        except FrameError:
            if len(part.hidden) == 1:
                raise  # no channel can carry this token
            for half in torch.arange(len(part.hidden)).chunk(2):  # more than a buffer of the channel holds
                self._send(part.take(HostGroup(0, half, part.expert_ids[half])), host)
        except ChannelError as error:
            part.met(f"host {host.replica_id} was lost: {error}")
            self.num_by_trouble["lost"] += 1
            self._wait(part, 0.0)
            self._lose(link, str(error))
        else:
            part.link, part.sent_at = link, time.monotonic()
            link.unanswered[part.sequence] = part
            part.handle.sent[part.sequence] = part
            self.num_frames += 1

    def _collect(self, wait_s: float) -> None:
        """Waits for something to arrive, takes all that has."""
        for link in self._links.poll(wait_s):
            self._drain(link)

    def _drain(self, link: Link) -> None:
        """Takes what has arrived on one channel, be it the channel's end."""
        try:
            while (answer := link.channel.receive()) is not None:
                self._take(link, answer)
                if not link.unanswered:  # nothing more is owed; whatever else comes keeps the descriptor readable
                    break
        except ChannelError as error:
            self._lose(link, str(error))
            return
        if link.is_silent and link.channel.heartbeat.is_answered:
            self._links.hear(link)

    def _take(self, link: Link, answer: ExpertsAnswer) -> None:
        part = link.unanswered.get(answer.sequence)
        if part is None or part.attempt != answer.attempt:
            return
        del link.unanswered[answer.sequence]
        del part.handle.sent[answer.sequence]
        self._links.trust(link.host)
        if answer.kind == FrameKind.PARTIAL and answer.partial is not None:
            part.partial = answer.partial
            link.answered[answer.sequence] = part
            part.handle.answered.append(part)
            return
        self._release(link, answer.sequence)
        part.link = None
        name = link.host.replica_id
        if answer.kind == FrameKind.NOT_HERE:
            assert part.version is not None
            self.num_by_trouble["not_here"] += 1
            part.met(f"host {name} does not hold them").refused[link.host] = part.version
            self._wait(part, 0.0)
        elif answer.kind == FrameKind.BUSY:
            self.num_by_trouble["busy"] += 1
            self._back_off(part, f"host {name} is busy")
        else:
            trouble = part.met(f"host {name} failed: {answer.reason or answer.kind.name}")
            trouble.failures += 1
            self.num_by_trouble["failed"] += 1
            trouble.avoided.add(link.host)
            if trouble.failures >= self.limits.max_failures:
                self._fail(part, BatchAtFault, f"{trouble.failures} attempts failed")
            self._wait(part, 0.0)

    def _lose(self, link: Link, reason: str) -> None:
        """The channel is gone: what its host had goes elsewhere."""
        for part in self._links.lose(link, reason):
            del part.handle.sent[part.sequence]
            trouble = part.met(f"host {link.host.replica_id} was lost: {reason}")
            self.num_by_trouble["lost"] += 1
            trouble.deaths += not link.is_silent  # a host that has been silent for long was stopped or cut off, not killed by a batch
            trouble.avoided.add(link.host)
            if trouble.deaths >= self.limits.max_deaths:
                self._fail(part, PoisonedBatch, f"{trouble.deaths} hosts were lost while they had this batch")
            self._wait(part, 0.0)

    def _release(self, link: Link, sequence: int, *, abandoned: bool = False) -> None:
        link.answered.pop(sequence, None)
        try:
            link.channel.release(sequence, abandoned=abandoned)
        except ChannelError as error:
            self._lose(link, str(error))
        self._links.close_if_retired(link)

    # -- waiting

    def _wait(self, part: Part, delay_s: float) -> None:
        part.not_before = time.monotonic() + delay_s
        part.handle.waiting.append(part)

    def _back_off(self, part: Part, reason: str) -> None:
        trouble = part.met(reason)
        trouble.backoff_s = min(max(2 * trouble.backoff_s, self.limits.min_backoff_s), self.limits.max_backoff_s)
        if part.host is not None:
            trouble.avoided.add(part.host)
        self._wait(part, trouble.backoff_s)

    def _place_waiting(self, handle: BatchHandle) -> None:
        """Gives every waiting part whose time has come another try, under the newest map."""
        self._catch_up()
        now = time.monotonic()
        due = [part for part in handle.waiting if part.not_before <= now]
        handle.waiting = [part for part in handle.waiting if part.not_before > now]
        for part in due:
            self._place(part)

    def _catch_up(self) -> None:
        """The newest map, and the channels that have opened by now."""
        self._links.refresh()
        latest = self._latest_map()
        if latest is not None:
            self.adopt(latest)

    def _patience_s(self, handle: BatchHandle) -> float:
        until = handle.look_at
        if handle.waiting:
            until = min(until, *(part.not_before for part in handle.waiting))
        return until - time.monotonic()

    def _look_after(self, handle: BatchHandle) -> None:
        """What no answer brings up: heartbeats, hosts that are silent or slow, and the deadline."""
        waited_for = self._links.waited_for()
        for link in waited_for:
            self._drain(link)
        now = time.monotonic()
        handle.look_at = min(now + self.limits.look_interval_s, handle.deadline)
        silent = [link for link in waited_for if link.unanswered and link.channel.heartbeat.is_silent(now, self.limits.silent_after_s)]
        for link in silent:
            self._links.miss(link)
        if silent:
            self._catch_up()
            for link in silent:
                self._resend_silent(link)
        self._resend_slow(handle, now)
        if handle.is_open and handle.error is None and now >= handle.deadline:
            handle.error = self._too_late(handle)

    def _resend_silent(self, link: Link) -> None:
        """What a silent host owes goes to others, where every expert of the part has one that is heard."""
        for part in [part for part in link.unanswered.values() if part.handle.error is None]:
            trouble = part.met(f"host {link.host.replica_id} is silent")
            trouble.avoided.add(link.host)
            if trouble.silences < self.limits.max_deaths and self._has_audible(part):
                trouble.silences += 1
                self.num_by_trouble["silent"] += 1
                self._give_up(part)
                self._wait(part, 0.0)

    def _has_audible(self, part: Part) -> bool:
        """Whether the part would go to hosts only that are not silent."""
        hosts = {group.host for group in group_by_host(part.expert_ids, self._tables.host_table(part), len(self._tables.hosts))}
        links = [None if host == NOBODY else self._links.get(self._tables.hosts[host]) for host in hosts]
        return all(link is not None and not link.is_silent for link in links)

    def _resend_slow(self, handle: BatchHandle, now: float) -> None:
        """Slow is not dead: only where every expert of the part has another trusted host, and only a small share of all frames."""
        too_old = now - self.limits.resend_after_s
        slow = [part for part in handle.sent.values() if part.sent_at < too_old]
        if slow:
            self._links.refresh()
        for part in slow:
            if self._num_resent > self.limits.max_resent_share * self.num_frames or not self._tables.has_alternative(part):
                continue
            assert part.host is not None
            self._num_resent += 1
            self.num_by_trouble["slow"] += 1
            part.met(f"host {part.host.replica_id} is slow").avoided.add(part.host)
            self._give_up(part)
            self._wait(part, 0.0)

    def _give_up(self, part: Part) -> None:
        """Stops waiting for a sent part; its buffer stays the host's."""
        part.handle.sent.pop(part.sequence, None)
        link, part.link = part.link, None
        if link is not None:
            del link.unanswered[part.sequence]
            self._release(link, part.sequence, abandoned=True)

    # -- the end of a batch

    @staticmethod
    def _fail(part: Part, kind: type[BatchAtFault], what: str) -> None:
        if part.handle.error is None:
            part.handle.error = kind(f"{part.name()}: {what}; {part.reason}")

    def _reason_to_refuse(self, placement: PlacementMap) -> str:
        old = self._map
        if old is None:
            return ""
        if placement.version < old.version:
            return f"{old.version.epoch}.{old.version.n} is newer"
        reached = [expert for expert in placement.uncovers(old) if any(map(self._links.is_reachable, old.expert_to_hosts[expert]))]
        return f"it has no host for {len(reached)} experts that can be reached, {min(reached)} among them" if reached else ""

    def _too_late(self, handle: BatchHandle) -> ExpertsUnavailable:
        for part in handle.sent.values():
            if part.host is not None:
                part.met(f"host {part.host.replica_id} has not answered")
                self._links.suspect(part.host)
        reasons = "; ".join(f"{part.name()}: {part.reason}" for part in (*handle.waiting, *handle.sent.values()))
        return ExpertsUnavailable(f"no answer within {self.limits.step_timeout_s:g} s; {reasons}")

    def _acknowledge(self) -> None:
        pinned = [handle.version for handle in self._open_handles]
        if self._map is not None:
            self.acknowledged = min([self._map.version, *pinned])
