import pytest
from pydantic import ValidationError

from cluster.config import SecuritySettings, StateStoreSettings, read_config
from cluster.doors import check_tls, tls_options
from cluster.errors import ConfigError, StartError
from cluster.guard.http_guard import scope_of
from cluster.guard.keys import entry_text, new_key
from cluster.guard.keys_file import add_key
from cluster.guard.setup import check_binding, is_loopback, make_guards, settle_keys
from cluster.guard.shared_counts import SharedCounts
from cluster.serve_config import serve_config

TEXT, ENTRY = new_key("a", ("inference",))
STORE = StateStoreSettings()


NEAR = ("127.0.0.1", "127.1.2.3", "::1", "localhost")
FAR = ("0.0.0.0", "::", "", "10.0.0.1", "example.com", "localhost.example.com")


@pytest.mark.parametrize("host", [*NEAR, *FAR])
def test_what_is_reached_from_this_machine_only(host):
    assert is_loopback(host) == (host in NEAR)
    if host in NEAR:
        check_binding(host, SecuritySettings(), {})
    else:
        with pytest.raises(StartError, match=r"shoal keys new.*--insecure"):
            check_binding(host, SecuritySettings(), {})
        check_binding(host, SecuritySettings(insecure=True), {})
        check_binding(host, SecuritySettings(keys=(ENTRY,)), {})
        check_binding(host, SecuritySettings(keys_file="/keys.yaml"), {})
        check_binding(host, SecuritySettings(), {"SHOAL_KEYS": "keys: []"})


async def test_without_keys_grpc_takes_the_one_that_was_drawn():
    keys, security = settle_keys(SecuritySettings(), {})
    assert (keys.http, keys.is_for_clients) == (None, True)
    assert keys.grpc not in repr(security) + security.model_dump_json()
    guards = make_guards(security, STORE, "app", "c", {})
    assert guards.http is None
    for scope in ("inference", "operator", "any"):
        assert (await guards.grpc.admit(f"Bearer {keys.grpc}", scope)).key_id == "drawn-at-start"
    await guards.grpc.close()


def test_insecure_is_open_and_undrawn_grpc_is_shut():
    assert settle_keys(SecuritySettings(insecure=True), {})[0].grpc is None
    guards = make_guards(SecuritySettings(insecure=True), STORE, "app", "c", {})
    assert (guards.http, guards.grpc) == (None, None)
    assert make_guards(SecuritySettings(), STORE, "app", "c", {}).grpc.num_keys == 0


async def test_configured_keys_hold_on_both_doors_and_shoal_serve_has_its_own(tmp_path):
    file = tmp_path / "keys.yaml"
    in_file, entry = new_key("in-file", ("operator",))
    add_key(file, entry)
    in_variable, other = new_key("in-variable", ("inference",))
    environment = {"SHOAL_KEYS": entry_text(other)}
    settings = SecuritySettings(keys=(ENTRY,), keys_file=str(file), insecure=True)
    own, security = settle_keys(settings, environment)
    assert own.http == own.grpc
    assert not own.is_for_clients
    for where in ({}, environment):  # a Ray of our own hands the variable on, another one does not
        guards = make_guards(security, STORE, "app", "c", where)
        assert guards.http is guards.grpc
        for key, scope in ((TEXT, "inference"), (in_file, "operator"), (in_variable, "inference"), (own.http, "inference")):
            assert await guards.http.admit(f"Bearer {key}", scope)
        await guards.http.close()


def test_a_file_without_a_key_leaves_the_door_shut(tmp_path):
    file = tmp_path / "keys.yaml"
    file.write_text("keys: []\n")
    guards = make_guards(SecuritySettings(keys_file=str(file)), STORE, "app", "c", {})
    assert guards.http is not None
    assert guards.http.num_keys == 0


def test_what_is_wrong_with_the_keys_is_said_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        settle_keys(SecuritySettings(keys_file=str(tmp_path / "none.yaml")), {})
    with pytest.raises(ConfigError, match="SHOAL_KEYS: is no YAML"):
        settle_keys(SecuritySettings(), {"SHOAL_KEYS": "["})
    with pytest.raises(ConfigError, match=r"keys\[1\]\.id: is there twice"):
        settle_keys(SecuritySettings(keys=(ENTRY,)), {"SHOAL_KEYS": entry_text(new_key("a", ("inference",))[1])})


def test_redis_counts_where_it_is_configured():
    store = StateStoreSettings(redis_url="redis://:password@127.0.0.1:1/0")
    guards = make_guards(SecuritySettings(keys=(ENTRY,)), store, "app", "c", {})
    assert isinstance(guards.http.counts, SharedCounts)
    assert "password" not in guards.http.counts.name
    assert make_guards(SecuritySettings(keys=(ENTRY,)), STORE, "app", "c", {}).http.counts.name == "each gateway for itself"


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/health", None),
        ("GET", "/ready", None),
        ("GET", "/openapi.json", None),
        ("GET", "/docs", None),
        ("GET", "/dashboard", None),
        ("GET", "/dashboard/main.js", None),
        ("GET", "/cluster/dashboard", "any"),
        ("GET", "/cluster", "any"),
        ("GET", "/cluster/status", "any"),
        ("GET", "/cluster/operations/x", "any"),
        ("POST", "/cluster/rebalance", "operator"),
        ("POST", "/cluster/hosts/h/drain", "operator"),
        ("PATCH", "/cluster/scaling", "operator"),
        ("DELETE", "/cluster", "operator"),
        ("GET", "/v1/models", "any"),
        ("GET", "/v1/models/m", "any"),
        ("POST", "/v1/models", "inference"),
        ("POST", "/v1/completions", "inference"),
        ("POST", "/v1/chat/completions", "inference"),
        ("POST", "/v1/responses", "inference"),
        ("POST", "/tokenize", "inference"),
        ("GET", "/healthy", "inference"),
        ("GET", "/clusters", "inference"),
        ("GET", "/nowhere", "inference"),
    ],
)
def test_what_a_path_asks_for(method, path, scope):
    assert scope_of(method, path, open_metrics=True) == scope


def test_metrics_are_open_unless_told_otherwise():
    assert [scope_of("GET", "/metrics", open_metrics=is_open) for is_open in (True, False)] == [None, "any"]


def test_a_certificate_needs_its_key_and_makes_https(tmp_path):
    flags = {"model.path": "/models/tiny", "security.certificate_file": "cert.pem"}
    with pytest.raises(ConfigError, match="go together"):
        read_config(None, flags)
    config = read_config(None, flags | {"security.certificate_key_file": "key.pem"})
    options = tls_options(config.security)
    assert {name: path.rpartition("/")[2] for name, path in options.items()} == {"ssl_certfile": "cert.pem", "ssl_keyfile": "key.pem"}
    assert all(path.startswith("/") for path in options.values())
    assert serve_config(config)["http_options"]["ssl_certfile"] == options["ssl_certfile"]
    assert tls_options(SecuritySettings()) == {}


def test_the_serve_config_has_the_hashes_and_not_the_secret():
    config = read_config(None, {"model.path": "/models/tiny", "security.secret": "0123456789abcdef", "security.keys": [ENTRY.model_dump()]})
    security = serve_config(config)["applications"][0]["args"]["security"]
    assert security["keys"][0]["sha256"] == ENTRY.sha256
    assert "secret" not in security


def test_an_unknown_field_of_a_key_is_refused():
    with pytest.raises(ValidationError, match="extra"):
        SecuritySettings(keys=({**ENTRY.model_dump(), "key": TEXT},))


def test_a_certificate_that_haproxy_would_not_show_is_refused():
    certificate = SecuritySettings(certificate_file="/cert.pem", certificate_key_file="/key.pem")
    check_tls(certificate, has_haproxy=False)
    check_tls(SecuritySettings(), has_haproxy=True)
    with pytest.raises(ConfigError, match=r"security\.certificate_file: HAProxy as Serve's ingress has no TLS"):
        check_tls(certificate, has_haproxy=True)
