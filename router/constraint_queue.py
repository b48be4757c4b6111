"""Constrained requests on their way to the engine: their matchers are made beside its thread, which goes on with its steps."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from router.constraint_compiler import GrammarCompiler
from router.constraint_matcher import Matcher
from router.errors import RequestError
from router.request import Failure, Request

logger = logging.getLogger("shoal")

# More than one, so that a grammar that takes long does not hold up those that are compiled already.
NUM_THREADS = 2


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request that has its matcher, or will not have one."""

    request: Request
    matcher: Matcher | None
    failure: Failure | None = None


class MatcherQueue:
    """One thread adds, cancels and takes; `done` is called from another, in the order in which requests are ready."""

    def __init__(self, grammars: GrammarCompiler, done: Callable[[Prepared], None]) -> None:
        self._grammars = grammars
        self._done = done
        self._threads: ThreadPoolExecutor | None = None
        self._open: dict[str, Request] = {}

    def __len__(self) -> int:
        """Requests that have no matcher yet."""
        return len(self._open)

    def add(self, request: Request) -> None:
        """Begins with the request's matcher; no other of its id waits."""
        self._threads = self._threads or ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammars")
        self._open[request.request_id] = request
        self._threads.submit(self._prepare, request)

    def cancel(self, request_id: str) -> None:
        """Its matcher, once made, is not taken. An unknown id is ignored."""
        self._open.pop(request_id, None)

    def take(self, prepared: Prepared) -> bool:
        """Ends the wait of what was handed to `done`; False if it was cancelled in the meantime."""
        if self._open.get(prepared.request.request_id) is not prepared.request:
            return False
        del self._open[prepared.request.request_id]
        return True

    def close(self) -> None:
        """Nothing more is begun."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, request: Request) -> None:
        if self._open.get(request.request_id) is not request:
            return
        try:
            prepared = Prepared(request, self._grammars.matcher(request))
        except RequestError as error:
            prepared = Prepared(request, None, Failure(error.kind, str(error), getattr(error, "field", None)))
        except Exception:
            logger.exception("request %s: its grammar could not be compiled", request.request_id)
            message = "The router failed while it compiled the constraint; its log says why, under the request's id."
            prepared = Prepared(request, None, Failure("internal", message))
        self._done(prepared)
