"""From the configuration to a guard: where keys come from, who is asked for one, where use is counted."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cluster.config import SecuritySettings, StateStoreSettings
from cluster.errors import StartError
from cluster.guard.counts import Counts, LocalCounts
from cluster.guard.guard import Guard
from cluster.guard.key_source import KeySource
from cluster.guard.keys import ApiKey, check_keys, new_key, parse_keys
from cluster.guard.shared_counts import SharedCounts

KEYS_VARIABLE = "SHOAL_KEYS"  # the text of a keys file
GRPC_KEY_ID = "drawn-at-start"


@dataclass(frozen=True)
class Guards:
    """None: that door asks for no key."""

    http: Guard | None
    grpc: Guard | None


def asks_for_keys(security: SecuritySettings, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether keys are configured. They are even if the file is empty by now: a door that was shut does not open by that."""
    return bool(security.keys) or security.keys_file is not None or bool(environment.get(KEYS_VARIABLE))


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only; a name other than localhost might be anybody's."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def check_binding(host: str, security: SecuritySettings, environment: Mapping[str, str] = os.environ) -> None:
    """Raises StartError for a door that others could reach, with no key asked for and nobody's word that this is meant."""
    if not (is_loopback(host) or security.insecure or asks_for_keys(security, environment)):
        raise StartError(
            f"HTTP on {host} would be open to everybody who reaches this machine: make a key (`shoal keys new NAME --file keys.yaml`) "
            f"and give the file (--keys keys.yaml, security.keys_file), or say --insecure (security.insecure: true) on a trusted network"
        )


def draw_grpc_key(security: SecuritySettings) -> tuple[str | None, SecuritySettings]:
    """A key for gRPC, which Serve binds on every interface, where no keys are configured: its text, and the settings with its hash."""
    if security.insecure or security.grpc_key is not None or asks_for_keys(security):
        return None, security
    text, entry = new_key(GRPC_KEY_ID, ("inference", "operator"))
    return text, security.model_copy(update={"grpc_key": entry})


def make_guards(
    security: SecuritySettings,
    state_store: StateStoreSettings,
    application: str,
    cluster_id: str,
    environment: Mapping[str, str] = os.environ,
) -> Guards:
    """For one gateway. Raises ConfigError for keys that cannot be read."""
    if not asks_for_keys(security, environment):
        # HTTP is open (check_binding has seen to where); gRPC takes the key that was drawn, and without one nobody's.
        drawn: tuple[ApiKey, ...] = () if security.grpc_key is None else (security.grpc_key,)
        return Guards(None, None if security.insecure else Guard(KeySource(drawn)))
    given = parse_keys(environment.get(KEYS_VARIABLE, ""), KEYS_VARIABLE)
    fixed = check_keys([key.model_dump() for key in (*security.keys, *given)], "")
    file = None if security.keys_file is None else Path(security.keys_file)
    counts: Counts = LocalCounts()
    if state_store.redis_url is not None:
        counts = SharedCounts(state_store.redis_url, state_store.application or application, state_store.cluster or cluster_id)
    guard = Guard(KeySource(fixed, file), counts)
    return Guards(guard, guard)
