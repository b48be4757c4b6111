"""Messages of one stream that are ready at the same time travel from the gateway to Serve's proxy as one.

Ray carries an item of a stream in about a millisecond, whatever its size. So a gateway that is behind hands over everything that is
ready, and the proxy writes it to the client message by message: what the client sees is the same, and a full server is no
slower than its router.
"""

from typing import Any

import msgpack


class Packed:
    """Several messages as one item of Serve's, which serialises what a method yields."""

    def __init__(self, messages: list[Any]) -> None:
        self.messages = messages

    def SerializeToString(self) -> bytes:
        """What `unpack` reads."""
        packed: bytes = msgpack.packb([message.SerializeToString() for message in self.messages])
        return packed


def unpack(item: bytes) -> list[bytes]:
    """The messages of one item, serialised. Empty ones, by which a method ends a stream with a status, are left out."""
    return [message for message in msgpack.unpackb(item) if message]
