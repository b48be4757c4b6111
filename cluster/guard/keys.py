"""API keys as they are kept: an id, a hash, scopes and limits. The key itself is shown once, when it is made."""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cluster.errors import ConfigError

GivenScope = Literal["inference", "operator"]
Scope = Literal["inference", "operator", "any"]
Limit = Annotated[int, Field(ge=1)]
KEY_PREFIX = "shoal-"
KEY_BYTES = 32
MAX_KEY_CHARS = 512
INDEX_CHARS = 8


class KeyLimits(BaseModel):
    """What one key may use, over all gateways; None is no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: Limit | None = Field(default=None, description="Calls in any 60 s.")
    tokens_per_minute: Limit | None = Field(
        default=None, description="Tokens read and generated in any 60 s; an answer that has begun is finished and counts."
    )
    concurrent_streams: Limit | None = Field(default=None, description="Calls that generate at the same time.")

    @property
    def are_none(self) -> bool:
        """Whether there is nothing to count."""
        return self.requests_per_minute is None and self.tokens_per_minute is None and self.concurrent_streams is None


class ApiKey(KeyLimits):
    """One key, hashed."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", description="What logs and metrics call it.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False, description="SHA-256 of the key's text in UTF-8, in hexadecimal.")
    scopes: frozenset[GivenScope] = Field(min_length=1)

    def has(self, scope: Scope) -> bool:
        """Whether it may do what `scope` stands for."""
        return scope == "any" or scope in self.scopes


_ENTRIES = TypeAdapter(list[ApiKey])


class KeyRing:
    """The keys that hold now. Immutable."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self.keys = tuple(keys)
        self._index: dict[str, list[ApiKey]] = {}
        for key in self.keys:
            self._index.setdefault(key.sha256[:INDEX_CHARS], []).append(key)

    def find(self, presented: str) -> ApiKey | None:
        """The key whose text is `presented`.

        Hashes are compared in constant time; the index is by a part of the presented text's own hash, which nobody can steer
        towards a stored one.
        """
        digest = hash_key(presented)
        found = None
        for key in self._index.get(digest[:INDEX_CHARS], ()):
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def current(self, key: ApiKey) -> ApiKey | None:
        """What `key` is by now: the entry with its hash, None once it is revoked."""
        return next((one for one in self._index.get(key.sha256[:INDEX_CHARS], ()) if one.sha256 == key.sha256), None)


def hash_key(text: str) -> str:
    """As it is kept."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def new_key(key_id: str, scopes: Iterable[GivenScope], limits: KeyLimits | None = None) -> tuple[str, ApiKey]:
    """A key of 256 random bits, and its entry. Raises ConfigError for an id that is none."""
    text = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    (entry,) = check_keys([{"id": key_id, "sha256": hash_key(text), "scopes": list(scopes), **(limits or KeyLimits()).model_dump()}], "")
    return text, entry


def parse_keys(text: str, where: str) -> tuple[ApiKey, ...]:
    """The entries of a YAML (or JSON) text, `keys:` with a list below it. Raises ConfigError naming `where`, the entry and the field."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: is no YAML{_place(error)}") from error
    entries = tree.get("keys") if isinstance(tree, dict) and set(tree) == {"keys"} else tree
    if entries is None:
        return ()
    if not isinstance(entries, list):
        raise ConfigError(f"{where}: must be `keys:` with a list of entries as `shoal keys new` prints them")
    return check_keys(entries, f"{where}: ")


def check_keys(entries: Iterable[Any], prefix: str) -> tuple[ApiKey, ...]:
    """Raises ConfigError for what is no entry, and for an id or a hash that is there twice. Never repeats a value: it may be a key."""
    try:
        keys = _ENTRIES.validate_python(list(entries))
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False, include_context=False)
        lines = [
            f"keys{''.join(f'[{part}]' if isinstance(part, int) else f'.{part}' for part in one['loc'])}: {one['msg']}" for one in problems
        ]
        raise ConfigError(prefix + "; ".join(lines)) from None
    for name in ("id", "sha256"):
        values = [getattr(key, name) for key in keys]
        twice = next((index for index, value in enumerate(values) if value in values[:index]), None)
        if twice is not None:
            raise ConfigError(f"{prefix}keys[{twice}].{name}: is there twice (entry {keys[twice].id})")
    return tuple(keys)


def entry_text(key: ApiKey) -> str:
    """One entry of a keys file."""
    head = {"id": key.id, "sha256": key.sha256, "scopes": sorted(key.scopes)}
    values = head | key.model_dump(mode="json", exclude_none=True, exclude=set(head))
    return yaml.safe_dump([values], sort_keys=False)


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f" (line {mark.line + 1})"
