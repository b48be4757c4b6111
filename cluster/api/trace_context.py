"""W3C trace context (https://www.w3.org/TR/trace-context/): the header or metadata `traceparent`, parsed, continued and echoed."""

import re
import secrets
from dataclasses import dataclass, replace

TRACEPARENT = "traceparent"
SAMPLED = 0x01
NO_TRACE_ID = "0" * 32
NO_SPAN_ID = "0" * 16
# A version above 00 may append fields of its own behind another dash; what comes before them is read as version 00.
_FORM = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?P<trace_id>[0-9a-f]{32})-(?P<span_id>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)
MAX_LENGTH = 256


@dataclass(frozen=True, slots=True)
class TraceContext:
    """`trace_id` (32 hex digits) names the whole trace, `span_id` (16) the span that the next one is a child of."""

    trace_id: str
    span_id: str
    is_sampled: bool = False

    def child(self) -> "TraceContext":
        """The same trace with a span id of its own, drawn at random."""
        return replace(self, span_id=_random_hex(8))

    def as_text(self) -> str:
        """The value of `traceparent`, version 00."""
        return f"00-{self.trace_id}-{self.span_id}-{SAMPLED if self.is_sampled else 0:02x}"


def parse(text: str | None) -> TraceContext | None:
    """None for what is no traceparent: the standard has a bad one ignored, and a new trace begun, never refused."""
    if text is None or len(text) > MAX_LENGTH:
        return None
    form = _FORM.fullmatch(text.strip(" \t"))
    if form is None or (form["version"] == "00" and form["more"] is not None):
        return None
    if form["trace_id"] == NO_TRACE_ID or form["span_id"] == NO_SPAN_ID:
        return None
    return TraceContext(form["trace_id"], form["span_id"], bool(int(form["flags"], 16) & SAMPLED))


def begin(*, is_sampled: bool) -> TraceContext:
    """The root of a new trace."""
    return TraceContext(_random_hex(16), _random_hex(8), is_sampled)


def _random_hex(num_bytes: int) -> str:
    """Never all zeros, which the standard has for no id."""
    while not int(text := secrets.token_hex(num_bytes), 16):
        pass
    return text
