"""What a configuration should not hold comes from the environment: Serve stores and shows its config in the clear."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import ValidationError

from cluster.config import SecuritySettings, ShoalConfig
from cluster.errors import ConfigError

SECRET_VARIABLE = "SHOAL_SECRET"  # security.secret
REDIS_PASSWORD_VARIABLE = "SHOAL_REDIS_PASSWORD"  # the password of state_store.redis_url


def with_secrets(config: ShoalConfig, environment: Mapping[str, str]) -> ShoalConfig:
    """The configuration, with what it leaves out and the environment has. What it says itself stays.

    A secret that lasts lets the replicas of one deploy and of the next speak with each other while Serve replaces them.
    Raises ConfigError for a secret that is too short; never shows it.
    """
    changes: dict[str, Any] = {}
    secret, url = environment.get(SECRET_VARIABLE), config.state_store.redis_url
    if secret and config.security.secret is None:
        try:
            SecuritySettings(secret=secret)
        except ValidationError as error:
            raise ConfigError(f"the variable {SECRET_VARIABLE}: {error.errors(include_input=False)[0]['msg']}") from None
        changes["security"] = config.security.model_copy(update={"secret": secret})
    password = environment.get(REDIS_PASSWORD_VARIABLE)
    if password and url is not None and urlsplit(url).password is None:
        changes["state_store"] = config.state_store.model_copy(update={"redis_url": _with_password(url, password)})
    return config.model_copy(update=changes)


def _with_password(url: str, password: str) -> str:
    parts = urlsplit(url)
    user, _, place = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{place}"))
