"""What outlives the Coordinator: its state as one value, kept in memory or in Redis. Redis away stops nothing."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.desired_placement import StoredHost
from cluster.errors import ClusterError
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey, MapVersion

FORMAT = 1
CALL_TIMEOUT_S = 2.0
# Writes unless a higher epoch is there already, whose Coordinator is in charge then; answers with the epoch that it found.
WRITE = """
local found = redis.call('HGET', KEYS[1], 'epoch') or '0'
if tonumber(found) <= tonumber(ARGV[1]) then redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'state', ARGV[2]) end
return found
"""


class StoreUnavailable(ClusterError):
    """The store does not answer, or `is_unreadable`: it holds what we cannot read. Names the store, never its password."""

    kind = "state_store_unavailable"

    def __init__(self, message: str, *, is_unreadable: bool = False) -> None:
        super().__init__(message)
        self.is_unreadable = is_unreadable


class StoreOutranked(ClusterError):
    """The store holds the state of a Coordinator with a higher epoch: `epoch`."""

    kind = "state_store_outranked"

    def __init__(self, epoch: int) -> None:
        super().__init__(f"the state store holds epoch {epoch}: another coordinator is in charge")
        self.epoch = epoch


@dataclass(frozen=True)
class StoredState:
    """`version` is the last published map's, or (epoch, 0). `loads` are tokens a second over the long window.

    `scaling` holds the run-time bounds by role, `draining` the hosts that an operator drains, `decisions` the last lines.
    """

    version: MapVersion
    hosts: tuple[StoredHost, ...] = ()
    loads: Mapping[LogicalExpert, float] = field(default_factory=dict)
    scaling: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    draining: tuple[HostKey, ...] = ()
    decisions: tuple[Mapping[str, Any], ...] = ()
    saved_unix_s: float = 0.0

    def to_json(self) -> str:
        """One line, loads to four digits."""
        state = {
            "format": FORMAT,
            "version": list(self.version),
            "hosts": [[*host.key, host.node_id, sorted(host.experts)] for host in self.hosts],
            "loads": [[*expert, float(f"{load:.4g}")] for expert, load in sorted(self.loads.items())],
            "scaling": {role: dict(bounds) for role, bounds in self.scaling.items()},
            "draining": [list(key) for key in self.draining],
            "decisions": [dict(line) for line in self.decisions],
            "saved_unix_s": self.saved_unix_s,
        }
        return json.dumps(state, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """What `to_json` wrote. Raises StoreUnavailable."""
        try:
            state = json.loads(text)
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']} is not {FORMAT}")
            return cls(
                version=MapVersion(*(int(number) for number in state["version"])),
                hosts=tuple(
                    StoredHost(HostKey(str(name), int(life)), str(node), frozenset(LogicalExpert(*expert) for expert in experts))
                    for name, life, node, experts in state["hosts"]
                ),
                loads={LogicalExpert(int(layer), int(expert)): float(load) for layer, expert, load in state["loads"]},
                scaling={str(role): {str(key): float(bound) for key, bound in its.items()} for role, its in state["scaling"].items()},
                draining=tuple(HostKey(str(name), int(life)) for name, life in state["draining"]),
                decisions=tuple({**line, "n": int(line["n"]), "kind": str(line["kind"])} for line in state["decisions"]),
                saved_unix_s=float(state["saved_unix_s"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            reason = f"the stored state cannot be read: {type(error).__name__}: {error}"
            raise StoreUnavailable(reason, is_unreadable=True) from error


class StateStore(Protocol):
    """Where the state is. Every call may block for CALL_TIMEOUT_S, and raise StoreUnavailable."""

    def read(self) -> StoredState | None:
        """What was written last; None if nothing ever was."""
        ...

    def write(self, state: StoredState) -> None:
        """Replaces it. StoreOutranked, and nothing is written, if a state of a higher epoch is there."""
        ...

    def close(self) -> None:
        """Lets go of connections. Idempotent."""
        ...

    @property
    def name(self) -> str:
        """For a person, without any password."""
        ...


class MemoryStore:
    """Lives as long as the process: what survives the Coordinator then is what members report."""

    name = "memory"

    def __init__(self) -> None:
        self._state: StoredState | None = None

    def read(self) -> StoredState | None:
        """See StateStore."""
        return self._state

    def write(self, state: StoredState) -> None:
        """See StateStore."""
        if self._state is not None and self._state.version.epoch > state.version.epoch:
            raise StoreOutranked(self._state.version.epoch)
        self._state = state

    def close(self) -> None:
        """See StateStore."""


class RedisStore:
    """One hash in Redis, `shoal:{application}:{cluster}:state`, so that two clusters with one application never share it.

    `redis_url` as redis-py takes it: `redis://` or `rediss://` (TLS) with user, password and database, and in the query TLS
    details such as `ssl_ca_certs`. Nothing is connected before the first call.
    """

    def __init__(self, redis_url: str, application: str, cluster_id: str) -> None:
        self.key = f"shoal:{application}:{cluster_id}:state"
        try:
            parts = urlsplit(redis_url)
            self.name = f"{parts.scheme}://{parts.hostname or ''}:{parts.port or 6379}{parts.path}"
            self._redis = redis.Redis.from_url(
                redis_url,
                socket_timeout=CALL_TIMEOUT_S,
                socket_connect_timeout=CALL_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
                decode_responses=True,
            )
        except (ValueError, TypeError) as error:
            raise StoreUnavailable(f"state_store.redis_url is no Redis URL: {error}") from error

    def read(self) -> StoredState | None:
        """See StateStore."""
        try:
            text = self._redis.hget(self.key, "state")
        except (redis.RedisError, OSError, TypeError) as error:
            raise self._unavailable(error) from error
        return None if text is None else StoredState.from_json(str(text))

    def write(self, state: StoredState) -> None:
        """See StateStore."""
        epoch = state.version.epoch
        try:
            found = int(str(self._redis.eval(WRITE, 1, self.key, str(epoch), state.to_json())))
        except (redis.RedisError, OSError, TypeError, ValueError) as error:
            raise self._unavailable(error) from error
        if found > epoch:
            raise StoreOutranked(found)

    def close(self) -> None:
        """See StateStore."""
        with suppress(redis.RedisError, OSError):
            self._redis.close()

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(f"the state store {self.name} does not answer: {type(error).__name__}: {error}")
