"""Secrets from the environment."""

import pytest
import redis

from cluster.app import build
from cluster.config import ShoalConfig
from cluster.errors import ConfigError
from cluster.secrets_from_environment import with_secrets
from tests.tiny_models import write_tiny

SECRET = "a secret of sixteen bytes or more"
PASSWORD = "p@ss/word:with?everything#%"


def config(**branches):
    return ShoalConfig(name="m", model={"path": "/models/m"}, **branches)


def test_nothing_there_changes_nothing():
    wanted = config(state_store={"redis_url": "redis://r:6379/0"})
    assert with_secrets(wanted, {}) == wanted


def test_the_data_plane_s_secret():
    assert with_secrets(config(), {"SHOAL_SECRET": SECRET}).security.secret == SECRET


def test_the_configuration_s_own_stays():
    wanted = config(security={"secret": "another secret, quite long"}, state_store={"redis_url": "redis://:own@r:6379/0"})
    assert with_secrets(wanted, {"SHOAL_SECRET": SECRET, "SHOAL_REDIS_PASSWORD": PASSWORD}) == wanted


@pytest.mark.parametrize(
    ("url", "user"), [("redis://r:6379/0", None), ("rediss://shoal@r:6379/3?ssl_ca_certs=/ca.pem", "shoal"), ("redis://[::1]:6379", None)]
)
def test_redis_gets_the_password_as_it_is(url, user):
    filled = with_secrets(config(state_store={"redis_url": url}), {"SHOAL_REDIS_PASSWORD": PASSWORD}).state_store.redis_url
    assert filled is not None
    before, after = (redis.connection.parse_url(one) for one in (url, filled))
    assert (after.pop("password"), after.pop("username", None)) == (PASSWORD, user)
    before.pop("username", None)
    assert after == before


def test_without_a_store_there_is_nothing_to_log_in_to():
    assert with_secrets(config(), {"SHOAL_REDIS_PASSWORD": PASSWORD}).state_store.redis_url is None


def test_a_short_secret_is_refused_and_not_shown():
    with pytest.raises(ConfigError, match=r"SHOAL_SECRET.*16 characters") as refusal:
        with_secrets(config(), {"SHOAL_SECRET": "hunter2"})
    assert "hunter2" not in str(refusal.value)


def test_one_deploy_and_the_next_have_the_same_secret(tmp_path, monkeypatch):
    """While Serve replaces replicas, those of both speak with each other."""
    wanted = ShoalConfig(name="m", model={"path": str(write_tiny("v2-lite", tmp_path)), "device": "cpu"})

    def secret_of_a_deploy():
        setup, *_ = build(wanted)._bound_deployment.init_args
        return setup.secret

    monkeypatch.delenv("SHOAL_SECRET", raising=False)
    assert secret_of_a_deploy() != secret_of_a_deploy()
    monkeypatch.setenv("SHOAL_SECRET", SECRET)
    assert secret_of_a_deploy() == secret_of_a_deploy() == SECRET.encode()
