"""Plain loops as machine code: small decisions on the token path and in the control loop, without importing torch."""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles on first call, and keeps the machine code on disk where there is a place for it. Division by zero is not checked."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:
        # No directory to cache in (a read-only image without a home): every process compiles for itself.
        return njit(nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]
