"""Where routers and gateways connect to: one I/O thread that accepts, proves, reads and answers heartbeats, apart from compute."""

import logging
import os
import secrets
import select
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from router.errors import ChannelClosed, ChannelError
from router.placement_map import Endpoint
from router.transport.channel import Incoming
from router.transport.frame_reader import Frame
from router.transport.frames import FrameKind, Header, pack_header
from router.transport.half_open import HalfOpen
from router.transport.handshake import HANDSHAKE_TIMEOUT_S, Handshake, Hello, Role, new_incarnation
from router.transport.host_end import HostEnd, Progress
from router.transport.messages import MessageConnection
from router.transport.peer import Peer
from router.transport.tcp import tune
from router.transport.tickets import Tickets

if TYPE_CHECKING:
    from model.cpu_in_place import InPlaceTable
    from router.transport.in_place import InPlacePoll

logger = logging.getLogger("shoal")

_BACKLOG = 128
_ACCEPT_PAUSE_S = 0.1
_ROUTER_KINDS = frozenset({FrameKind.EXPERTS, FrameKind.CANCEL, FrameKind.PING})
_GATEWAY_KINDS = frozenset({FrameKind.MESSAGE, FrameKind.PING})


@dataclass(frozen=True)
class ListenerLimits:
    """The host's end. Per router: past `max_waiting_*` frames and bytes it is answered BUSY. Per router and gateway: one that
    lets `max_queued_*` bytes pile up unread is cut off.
    """

    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S
    max_half_open: int = 64
    max_shared_bytes: int = 1 << 34
    max_payload_bytes: int = 1 << 29
    max_queued_answer_bytes: int = 1 << 30
    max_queued_message_bytes: int = 1 << 26
    max_waiting_frames: int = 4096
    max_waiting_bytes: int = 1 << 31


class _Service(Protocol):
    """What a peer's frames go to."""

    def handle(self, frame: Frame) -> None: ...
    def close(self) -> None: ...


class Listener:
    """Listens on an abstract Unix socket and on a TCP port of its own, until `close`.

    `on_frame` takes routers' frames, `on_message` gateways' messages, `on_message_close` a gateway's end; who comes for what
    is not given is refused. All are called in the I/O thread and should only pass on what they get: while they run,
    heartbeats wait. A router's decode frame in shared memory that has come alone is answered by machine code, if the layers that it
    may compute are given: `in_place`.
    """

    def __init__(
        self,
        secret: bytes,
        application: str,
        node_id: str,
        on_frame: Callable[[Incoming], None] | None = None,
        on_message: Callable[[MessageConnection, dict[str, Any]], None] | None = None,
        on_message_close: Callable[[MessageConnection], None] | None = None,
        in_place: "InPlaceTable | None" = None,
        tcp_host: str = "127.0.0.1",
        limits: ListenerLimits | None = None,
    ) -> None:
        self._secret = secret
        self._application = application
        self._node_id = node_id
        self._on_frame = on_frame
        self._on_message = on_message
        self._on_message_close = on_message_close
        self._limits = limits or ListenerLimits()
        self._incarnation = new_incarnation()
        self._roles = frozenset({Role.ROUTER} if on_frame else ()) | frozenset({Role.GATEWAY} if on_message else ())
        self._progress = Progress()
        self._channel_ids = count(1)
        self._half_open: OrderedDict[int, HalfOpen] = OrderedDict()  # oldest first
        self._peers: dict[int, tuple[Peer, _Service]] = {}
        self._accept_again_at: float | None = None
        self._is_closing = False
        unix_name = f"shoal-{secrets.token_hex(16)}"
        self._sockets: dict[int, socket.socket] = {}
        tcp = self._listen(socket.AF_INET6 if ":" in tcp_host else socket.AF_INET, (tcp_host, 0))
        self._listen(socket.AF_UNIX, "\0" + unix_name)
        self.endpoint = Endpoint(node_id, unix_name, tcp_host, tcp.getsockname()[1])
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        for fd in (self._wake, *self._sockets):
            self._epoll.register(fd, select.EPOLLIN)
        self._in_place: InPlacePoll | None = None
        if in_place is not None:
            from router.transport import in_place as machine_code  # brings Numba

            self._in_place = machine_code.InPlacePoll(self._epoll, in_place)
        self._thread = threading.Thread(target=self._run, name="channels", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the thread and every connection. Idempotent."""
        if not self._is_closing:
            os.eventfd_write(self._wake, 1)  # before the flag: once it is set, the thread may end and close the descriptor
            self._is_closing = True
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        """False once the I/O thread ended, for the health check: nobody is accepted or heard any more."""
        return self._thread.is_alive()

    def _listen(self, family: int, address: str | tuple[str, int]) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.bind(address)
            sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            for other in self._sockets.values():
                other.close()
            raise
        sock.setblocking(False)
        self._sockets[sock.fileno()] = sock
        return sock

    def _run(self) -> None:
        try:
            while not self._is_closing:
                for fd, events in self._wait():
                    self._turn(fd, events)
                if self._half_open or self._accept_again_at is not None:
                    self._expire(time.monotonic())
        finally:
            self._close_all()

    def _wait(self) -> list[tuple[int, int]]:
        timeout_s = self._timeout_s()
        if self._in_place is None:
            return self._epoll.poll(timeout_s)
        return self._in_place.poll(timeout_s)

    def _timeout_s(self) -> float | None:
        if not self._half_open and self._accept_again_at is None:
            return None
        times = [] if self._accept_again_at is None else [self._accept_again_at]
        if self._half_open:
            times.append(next(iter(self._half_open.values())).deadline)
        return max(min(times) - time.monotonic(), 0.0) + 0.001

    def _turn(self, fd: int, events: int) -> None:
        """What is unforeseen costs the one descriptor on which it comes up, not the thread."""
        try:
            if fd in self._peers:
                self._serve(fd, events)
            elif fd in self._half_open:
                self._advance(fd)
            elif fd in self._sockets:
                self._accept(self._sockets[fd])
        except Exception:
            logger.exception("a channel is cut off: what came on it could not be handled")
            if fd in self._peers:
                self._drop_peer(fd)
            elif fd in self._half_open:
                self._drop_half_open(fd, "see above")
            elif fd in self._sockets:
                self._pause_accepting()

    def _serve(self, fd: int, events: int) -> None:
        peer, service = self._peers[fd]
        try:
            if events & select.EPOLLOUT:
                peer.flush()
            if events & ~select.EPOLLOUT:
                for frame in self._read(peer):
                    if frame.header.kind == FrameKind.PING:
                        peer.write([pack_header(Header(FrameKind.PONG, peer.incarnation, map_n=self._num_answered()))])
                    else:
                        service.handle(frame)
        except ChannelError as error:
            if not isinstance(error, ChannelClosed):
                logger.warning("a channel is cut off: %s", error)
            self._drop_peer(fd)

    def _read(self, peer: Peer) -> list[Frame]:
        """What has arrived, and what machine code has read and left, or computed and could not tell."""
        if self._in_place is None:
            return peer.read()
        if (unsent := self._in_place.unsent) is not None:
            peer.write([unsent])
        return peer.read(self._in_place.received)

    def _num_answered(self) -> int:
        return self._progress.num_answered + (0 if self._in_place is None else self._in_place.num_answered)

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except BlockingIOError:
            return
        except OSError as error:
            logger.warning("cannot accept a connection: %s", error)
            self._pause_accepting()
            return
        if len(self._half_open) >= self._limits.max_half_open:
            # Room for the newest: who holds sockets open without a word must not keep others out.
            self._drop_half_open(next(iter(self._half_open)), "too many peers have not proved themselves")
        if sock.family != socket.AF_UNIX:
            with suppress(OSError):
                tune(sock)
        handshake = Handshake(self._secret, self._application, Role.HOST, self._node_id, self._incarnation)
        deadline = time.monotonic() + self._limits.handshake_timeout_s
        self._half_open[sock.fileno()] = HalfOpen(sock, handshake.as_host(self._roles), deadline, self._limits.max_shared_bytes)
        self._epoll.register(sock, select.EPOLLIN)

    def _pause_accepting(self) -> None:
        """Out of descriptors: a listening socket stays readable, and the thread would spin on it."""
        self._accept_again_at = time.monotonic() + _ACCEPT_PAUSE_S
        for fd in self._sockets:
            self._epoll.modify(fd, 0)

    def _advance(self, fd: int) -> None:
        half_open = self._half_open[fd]
        try:
            hello = half_open.advance()
        except (ChannelError, OSError) as error:  # OSError: no memory or no descriptor is left for the peer's buffer
            self._drop_half_open(fd, str(error))
            return
        if hello is not None:
            self._admit(fd, half_open, hello)
            del self._half_open[fd]

    def _admit(self, fd: int, half_open: HalfOpen, hello: Hello) -> None:
        limits = self._limits
        is_router = hello.role == Role.ROUTER
        kinds = _ROUTER_KINDS if is_router else _GATEWAY_KINDS
        max_queued_bytes = limits.max_queued_answer_bytes if is_router else limits.max_queued_message_bytes
        peer = Peer(half_open.sock, self._epoll, hello.incarnation, kinds, limits.max_payload_bytes, max_queued_bytes)
        service: _Service
        if is_router:
            assert self._on_frame is not None
            tickets = Tickets(limits.max_waiting_frames, limits.max_waiting_bytes)
            service = HostEnd(peer, next(self._channel_ids), half_open.mapping, self._on_frame, tickets, self._progress)
            if self._in_place is not None and half_open.mapping is not None:
                channel = peer.open_in_place(memoryview(half_open.mapping))
                tickets.watcher = channel.set_num_tickets
                self._in_place.watch(fd, channel)
        else:
            assert self._on_message is not None
            service = MessageConnection(peer, hello.node_id, self._on_message, self._on_message_close)
        self._peers[fd] = (peer, service)

    def _expire(self, now: float) -> None:
        while self._half_open:
            fd, oldest = next(iter(self._half_open.items()))
            if oldest.deadline > now:
                break
            self._drop_half_open(fd, "the peer did not prove itself in time")
        if self._accept_again_at is not None and self._accept_again_at <= now:
            self._accept_again_at = None
            for fd in self._sockets:
                self._epoll.modify(fd, select.EPOLLIN)

    def _drop_half_open(self, fd: int, reason: str) -> None:
        logger.warning("a peer was refused: %s", reason)
        self._half_open.pop(fd).close()

    def _drop_peer(self, fd: int) -> None:
        peer, service = self._peers.pop(fd)
        if self._in_place is not None:
            self._in_place.forget(fd)
        peer.close()
        try:
            service.close()
        except Exception:
            logger.exception("the end of a connection could not be handled")

    def _close_all(self) -> None:
        for fd in list(self._half_open):
            self._half_open.pop(fd).close()
        for fd in list(self._peers):
            self._drop_peer(fd)
        for sock in self._sockets.values():
            sock.close()
        self._epoll.close()
        os.close(self._wake)
