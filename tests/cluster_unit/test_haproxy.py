import socket

import pytest

from cluster.config import GatewaySettings, SecuritySettings
from cluster.errors import ConfigError
from cluster.haproxy import check_ingress, has_haproxy, use_haproxy

CERTIFICATE = SecuritySettings(certificate_file="/cert.pem", certificate_key_file="/key.pem")


def test_files_ports_and_bounds_are_its_own(tmp_path):
    environment: dict[str, str] = {}
    use_haproxy(tmp_path, GatewaySettings(max_timeout_s=90.5, max_ongoing_requests=7), environment)
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert environment["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"] == str(tmp_path / "haproxy.cfg")
    assert environment["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"] == str(tmp_path)
    assert environment["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == "91"
    assert environment["RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS"] == "7"
    ports = {int(environment[f"RAY_SERVE_HAPROXY_{name}_PORT"]) for name in ("METRICS", "STATS")}
    assert len(ports) == 2
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("", port))


def test_what_the_environment_says_already_stays(tmp_path):
    environment = {"RAY_SERVE_HAPROXY_STATS_PORT": "8404"}
    use_haproxy(tmp_path, GatewaySettings(), environment)
    assert environment["RAY_SERVE_HAPROXY_STATS_PORT"] == "8404"


@pytest.mark.parametrize(("variable", "is_on"), [(None, False), ("0", False), ("1", True)])
def test_a_certificate_that_haproxy_would_not_show_is_refused(variable, is_on, monkeypatch):
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", variable)
    assert has_haproxy() is is_on
    check_ingress(SecuritySettings())
    if is_on:
        with pytest.raises(ConfigError, match=r"security\.certificate_file: HAProxy as Serve's ingress has no TLS"):
            check_ingress(CERTIFICATE)
    else:
        check_ingress(CERTIFICATE)
