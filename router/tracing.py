"""What a router tells whoever traces it; without one nothing is told, and nothing is paid."""

from typing import Protocol

from router.request import Delta, Request


class RequestTracer(Protocol):
    """The engine's thread calls it; it must be quick, and must not raise."""

    def began(self, request: Request) -> None:
        """A request was let in."""
        ...

    def said(self, deltas: list[Delta]) -> None:
        """What a step says to gateways; a delta with `finish` ends its request."""
        ...

    def ended(self, request_id: str, finish: str) -> None:
        """A request is over without a delta."""
        ...

    def step_begins(self) -> None:
        """A step of the engine begins."""
        ...

    def step_ends(self) -> None:
        """It is over."""
        ...
