"""The handshake: two processes prove to each other that they know the cluster's secret and belong to one application.

    client -> host   HELLO  role, nonce, incarnation, node id
    host -> client   HELLO  role, nonce, incarnation, node id
    client -> host   PROOF  HMAC-SHA256(secret, "client" and all that both have said, and the application)
    host -> client   PROOF  the same with "host"

The client proves itself first: who does not know the secret gets nothing but a nonce and a node id. The application is
never sent; it is part of what both sign, so two applications never meet, even with one secret. The proof is of the peer, not
of every byte after it: frames carry checksums against accidents, and a network that others can write to needs its own
protection. Pure: bytes in, bytes out; deadlines are the callers'.
"""

import hashlib
import hmac
import secrets
import struct
from collections.abc import Generator
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from router.errors import HandshakeError
from router.transport.frames import MAGIC, PROTOCOL_VERSION, Bytes

HANDSHAKE_TIMEOUT_S = 5.0
MAX_NODE_ID_BYTES = 128

_HELLO = struct.Struct(f"<4sBBQ32sB{MAX_NODE_ID_BYTES}s")
HELLO_BYTES = _HELLO.size
PROOF_BYTES = 32


class Role(IntEnum):
    """What a peer comes for."""

    HOST = 1  # whoever listens
    ROUTER = 2  # sends EXPERTS frames
    GATEWAY = 3  # sends messages


@dataclass(frozen=True)
class Hello:
    """How a process presents itself. `incarnation` is the channel's from a client, the process's own from a host."""

    role: Role
    incarnation: int
    node_id: str
    nonce: bytes

    def pack(self) -> bytes:
        """As it travels. ValueError for a node id that does not fit."""
        name = self.node_id.encode()
        if len(name) > MAX_NODE_ID_BYTES:
            raise ValueError(f"node id of {len(name)} bytes, at most {MAX_NODE_ID_BYTES}")
        return _HELLO.pack(MAGIC, PROTOCOL_VERSION, self.role, self.incarnation, self.nonce, len(name), name)

    @staticmethod
    def unpack(message: Bytes) -> "Hello":
        """HandshakeError unless it is one of ours."""
        if len(message) != HELLO_BYTES:
            raise HandshakeError(f"greeting of {len(message)} bytes, ours has {HELLO_BYTES}")
        magic, version, role, incarnation, nonce, length, name = _HELLO.unpack(message)
        if magic != MAGIC:
            raise HandshakeError("the peer is no Shoal process")
        if version != PROTOCOL_VERSION:
            raise HandshakeError(f"the peer speaks protocol version {version}, this process {PROTOCOL_VERSION}: run one version of Shoal")
        try:
            hello = Hello(Role(role), incarnation, name[:length].decode(), nonce)
        except ValueError as error:
            raise HandshakeError(f"the peer's greeting cannot be read: {error}") from error
        if hello.pack() != message:  # what is signed is what was sent, to the last byte
            raise HandshakeError("the peer's greeting has bytes that mean nothing")
        return hello


def new_incarnation() -> int:
    """A random number that no other channel or process has had."""
    return secrets.randbits(64)


# What its driver is to do next: send these bytes, or read that many and hand them in. Ends with the peer's greeting.
Steps: TypeAlias = Generator[bytes | int, bytes, Hello]


class Handshake:
    """One side's part, for one peer."""

    def __init__(self, secret: bytes, application: str, role: Role, node_id: str, incarnation: int) -> None:
        if not secret:
            raise ValueError("the cluster's secret is empty")
        self._key = hashlib.sha256(secret).digest()  # HMAC itself takes a key and the same with zeros at its end for one
        self._application = application.encode()
        self._mine = Hello(role, incarnation, node_id, secrets.token_bytes(32))

    def as_client(self) -> Steps:
        """The steps of who connects. HandshakeError if the host is none, or does not know the secret."""
        yield self._mine.pack()
        host = Hello.unpack((yield HELLO_BYTES))
        if host.role != Role.HOST:
            raise HandshakeError(f"a {host.role.name} listens where a host should")
        yield self._sign(b"client", self._mine, host)
        self._check((yield PROOF_BYTES), b"host", self._mine, host)
        return host

    def as_host(self, roles: frozenset[Role]) -> Steps:
        """The steps of who listens, to peers that come as one of `roles`. HandshakeError if the client has not proved itself."""
        client = Hello.unpack((yield HELLO_BYTES))
        if client.role not in roles:
            raise HandshakeError(f"no {client.role.name} is served here")
        yield self._mine.pack()
        self._check((yield PROOF_BYTES), b"client", client, self._mine)
        yield self._sign(b"host", client, self._mine)
        return client

    def _check(self, proof: bytes, label: bytes, client: Hello, host: Hello) -> None:
        if not hmac.compare_digest(proof, self._sign(label, client, host)):
            raise HandshakeError("the peer does not know this cluster's secret, or serves another application")

    def _sign(self, label: bytes, client: Hello, host: Hello) -> bytes:
        parts = (b"shoal channel", label, client.pack(), host.pack(), self._application)
        return hmac.digest(self._key, b"".join(struct.pack("<I", len(part)) + part for part in parts), "sha256")
