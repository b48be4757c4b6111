"""Errors of the guard.

GuardError (a ClusterError)
├── Unauthenticated     no key, or none that is known
├── PermissionDenied    the key lacks the scope, or was revoked
├── TooManyRequests     a limit is reached; says when to come back
├── BodyTooLarge        more bytes than are taken
└── BodyTooSlow         the body did not arrive in time
"""

import math
from collections.abc import Mapping

from cluster.errors import ClusterError

REALM = 'Bearer realm="shoal"'


class GuardError(ClusterError):
    """`headers` go out with the answer over HTTP."""

    kind = "guard"

    def __init__(self, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})


class Unauthenticated(GuardError):
    """Says what to send."""

    kind = "unauthenticated"

    def __init__(self, message: str, *, was_given: bool) -> None:
        super().__init__(message, {"www-authenticate": f'{REALM}, error="invalid_token"' if was_given else REALM})


class PermissionDenied(GuardError):
    """Names the key's id and what it lacks."""

    kind = "permission_denied"

    def __init__(self, message: str, scope: str | None = None) -> None:
        challenge = f'{REALM}, error="insufficient_scope", scope="{scope}"' if scope else f'{REALM}, error="invalid_token"'
        super().__init__(message, {"www-authenticate": challenge})


class TooManyRequests(GuardError):
    """Names the limit; `retry_after_s` is None for what no waiting helps."""

    kind = "rate_limited"

    def __init__(self, message: str, retry_after_s: float | None) -> None:
        retry = {"x-should-retry": "false"} if retry_after_s is None else {"retry-after": str(max(1, math.ceil(retry_after_s)))}
        super().__init__(message, retry)
        self.retry_after_s = retry_after_s


class BodyTooLarge(GuardError):
    """Names the limit. The connection ends, since the rest of the body may still be on its way."""

    kind = "body_too_large"

    def __init__(self, message: str) -> None:
        super().__init__(message, {"connection": "close"})


class BodyTooSlow(GuardError):
    """Names the limit."""

    kind = "body_too_slow"

    def __init__(self, message: str) -> None:
        super().__init__(message, {"connection": "close"})
