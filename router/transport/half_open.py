"""A peer that has connected and not yet proved itself: it costs one socket and a few hundred bytes, for a few seconds."""

import mmap
import os
import socket

from router.errors import HandshakeError
from router.transport.handshake import Hello, Role, Steps
from router.transport.shared_memory import ATTACH_BYTES, map_buffer

_MAX_FDS = 4


class HalfOpen:
    """The host's side of one handshake, moved on by whatever the peer has sent; never waits for it.

    A router on the same node hands over its shared buffer once both have proved themselves: `mapping`. Descriptors that a
    peer sends before that are dropped by the kernel, because they are not asked for.
    """

    def __init__(self, sock: socket.socket, steps: Steps, deadline: float, max_shared_bytes: int) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.deadline = deadline
        self.mapping: mmap.mmap | None = None
        self._steps = steps
        self._max_shared_bytes = max_shared_bytes
        self._peer: Hello | None = None
        self._received = b""
        self._fds: list[int] = []
        self._num_wanted = 0
        self._move(None)

    def advance(self) -> Hello | None:
        """The peer's greeting once it may be served; None while more has to come. HandshakeError if it is refused."""
        while True:
            if self._peer is not None and not self._must_attach:
                return self._peer
            missing = self._num_wanted - len(self._received)
            try:
                chunk = self._receive(missing)
            except BlockingIOError:
                return None
            except OSError as error:
                raise HandshakeError(f"the peer is gone: {error}") from error
            if not chunk:
                raise HandshakeError("the peer hung up")
            self._received += chunk
            if len(self._received) == self._num_wanted:
                message, self._received = self._received, b""
                if self._peer is None:
                    self._move(message)
                else:
                    fds, self._fds = self._fds, []
                    self.mapping = map_buffer(message, fds, self._max_shared_bytes)

    def close(self) -> None:
        """Of a peer that is refused."""
        for fd in self._fds:
            os.close(fd)
        self.sock.close()

    @property
    def _must_attach(self) -> bool:
        is_near_router = self.sock.family == socket.AF_UNIX and self._peer is not None and self._peer.role == Role.ROUTER
        return is_near_router and self.mapping is None

    def _receive(self, num_bytes: int) -> bytes:
        if self._peer is None:
            return self.sock.recv(num_bytes)
        chunk, fds, _, _ = socket.recv_fds(self.sock, num_bytes, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        self._fds += fds
        return chunk

    def _move(self, message: bytes | None) -> None:
        try:
            step = next(self._steps) if message is None else self._steps.send(message)
            while isinstance(step, bytes):
                self._send(step)
                step = next(self._steps)
            self._num_wanted = step
        except StopIteration as end:
            self._peer = end.value
            self._num_wanted = ATTACH_BYTES

    def _send(self, message: bytes) -> None:
        try:
            num_sent = self.sock.send(message)
        except OSError as error:
            raise HandshakeError(f"the peer is gone: {error}") from error
        if num_sent < len(message):
            raise HandshakeError("the peer does not read")
