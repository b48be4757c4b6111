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
OWN_KEY_ID = "shoal-serve"


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


@dataclass(frozen=True)
class OwnKeys:
    """What `shoal serve` itself sends to each door; None where none is asked for. `is_for_clients` where they have no other for gRPC."""

    http: str | None = None
    grpc: str | None = None
    is_for_clients: bool = False


def settle_keys(security: SecuritySettings, environment: Mapping[str, str] = os.environ) -> tuple[OwnKeys, SecuritySettings]:
    """The settings with all keys in place that can be had before the start, and ours among them. Raises ConfigError.

    Where no keys are configured, one is drawn for gRPC, which Serve binds on every interface whatever it is told.
    """
    if not asks_for_keys(security, environment):
        if security.insecure:
            return OwnKeys(), security
        text, entry = new_key(GRPC_KEY_ID, ("inference", "operator"))
        return OwnKeys(grpc=text, is_for_clients=True), security.model_copy(update={"grpc_key": entry})
    text, entry = new_key(OWN_KEY_ID, ("inference",))
    fixed = (*_fixed_keys(security, environment), entry)
    KeySource(fixed, _file(security))  # what is wrong with the file is said now, in one sentence
    return OwnKeys(text, text), security.model_copy(update={"keys": fixed})


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
    counts: Counts = LocalCounts()
    if state_store.redis_url is not None:
        counts = SharedCounts(state_store.redis_url, state_store.application or application, state_store.cluster or cluster_id)
    guard = Guard(KeySource(_fixed_keys(security, environment), _file(security)), counts)
    return Guards(guard, guard)


def _fixed_keys(security: SecuritySettings, environment: Mapping[str, str]) -> tuple[ApiKey, ...]:
    """Those of the configuration and of the environment, which may be the same ones."""
    given = parse_keys(environment.get(KEYS_VARIABLE, ""), KEYS_VARIABLE)
    return check_keys([*security.keys, *(key for key in given if key not in security.keys)], "")


def _file(security: SecuritySettings) -> Path | None:
    return None if security.keys_file is None else Path(security.keys_file)
