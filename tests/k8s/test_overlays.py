"""What an overlay says is what Shoal, Ray's autoscaler, Redis and the keys' guard make of it."""

import shutil
import subprocess
from pathlib import Path

import pytest
import redis
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from typer.testing import CliRunner

from cluster import cli
from cluster.guard.keys import KeyRing, parse_keys
from tests.cluster_unit.redis_server import BINARY
from tests.free_ports import free_port
from tests.k8s.deployment_rules import SECRETS
from tests.k8s.ray_service import RayService
from tests.k8s.rendering import K8S, OVERLAYS, only, overlay
from tests.k8s.schemas import complaints

TIMEOUT_S = 10.0


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_serve_config_is_what_shoal_config_prints(name):
    settings = K8S / "overlays" / name / "shoal.yaml"
    path = yaml.safe_load(settings.read_text())["model"]["path"]
    printed = CliRunner().invoke(cli.app, ["config", path, "--config", str(settings)])
    assert printed.exit_code == 0, printed.output
    said = only(overlay(name), "RayService")["spec"]["serveConfigV2"]
    assert said == printed.stdout, "run `make manifests`"


def test_the_serve_config_is_made_by_the_script(tmp_path):
    """As `make manifests` does it, with whatever `shoal` is."""
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / "shoal.yaml").write_text("router:\n  replicas: 2\nmodel:\n  dtype: bfloat16\n  path: /models/mine\nname: other\n")
    shoal = tmp_path / "shoal"
    shoal.write_text('#!/bin/sh\nprintf "asked: %s\\n\\nlast: 1\\n" "$*"\n')
    shoal.chmod(0o755)
    subprocess.run([K8S / "serve-config.sh", directory], check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, timeout=TIMEOUT_S)
    patch = yaml.safe_load((directory / "serve-config.yaml").read_text())
    assert (patch["kind"], patch["metadata"]["name"]) == ("RayService", "shoal")
    assert patch["spec"]["serveConfigV2"] == f"asked: config /models/mine --config {directory}/shoal.yaml\n\nlast: 1\n"


@pytest.mark.parametrize(
    ("name", "routers", "experts"),
    [
        ("cpu-demo", (1, 1, {"CPU": 2, "shoal_router": 1}), (1, 2, {"CPU": 0, "shoal_expert_host": 2})),
        ("gpu", (1, 4, {"CPU": 8, "GPU": 1, "shoal_router": 1}), (3, 6, {"CPU": 0, "GPU": 1, "shoal_expert_host": 1})),
        ("production", (2, 8, {"CPU": 16, "GPU": 1, "shoal_router": 1}), (3, 6, {"CPU": 0, "GPU": 8, "shoal_expert_host": 8})),
    ],
)
def test_ray_s_autoscaler_reads_the_groups(name, routers, experts):
    cluster = RayService(only(overlay(name), "RayService")).cluster
    config = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "shoal-abcde", "namespace": "shoal"}, "spec": cluster})
    types = config["available_node_types"]
    found = {}
    for group in ("routers", "experts"):
        resources = {name: amount for name, amount in types[group]["resources"].items() if name != "memory"}
        found[group] = (types[group]["min_workers"], types[group]["max_workers"], resources)
        assert types[group]["idle_timeout_s"] >= 300
    assert found == {"routers": routers, "experts": experts}
    (head,) = types.keys() - found.keys()
    assert types[head]["resources"]["CPU"] == 0


def test_the_script_makes_the_secrets():
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    runs = [subprocess.run([K8S / "secrets.sh"], capture_output=True, text=True, check=True, timeout=TIMEOUT_S) for _ in range(2)]
    first, second = ([one for one in yaml.safe_load_all(run.stdout) if one] for run in runs)
    assert complaints(first) == []
    assert {one["metadata"]["name"]: list(one["stringData"]) for one in first} == {name: [key] for name, key in SECRETS.items()}
    values = [value for one in [*first, *second] for value in one["stringData"].values()]
    assert len(set(values)) == len(values)
    assert all(len(value) >= 64 for value in values)
    presented = runs[0].stderr.split()[-1]
    key = KeyRing(parse_keys(only(first, "Secret", "shoal-api-keys")["stringData"]["keys.yaml"], "the Secret")).find(presented)
    assert key is not None
    assert set(key.scopes) == {"inference", "operator"}


@pytest.mark.skipif(BINARY is None, reason="redis-server is not installed")
def test_redis_starts_as_its_pod_starts_it_and_remembers(tmp_path):
    objects = overlay("production")
    pod = only(objects, "StatefulSet", "shoal-redis")["spec"]["template"]["spec"]
    port, password = free_port(), "a pass word with # and %"
    places = {"/data": tmp_path / "data", "/etc/redis": tmp_path / "etc", "/run/redis": tmp_path / "run"}
    for place in places.values():
        place.mkdir()
    settings = only(objects, "ConfigMap", "shoal-redis")["data"]["redis.conf"]
    (tmp_path / "etc" / "redis.conf").write_text(_moved(settings, places) + f"\nport {port}\nbind 127.0.0.1\n")
    command = [_moved(word, places) for word in pod["containers"][0]["command"]]
    assert password not in " ".join(command)
    for value in (None, "kept"):
        process = subprocess.Popen(
            command, env={"PATH": f"{Path(str(BINARY)).parent}:/usr/bin:/bin", "REDIS_PASSWORD": password}, stdout=subprocess.DEVNULL
        )
        try:
            with redis.Redis(
                port=port, password=password, decode_responses=True, retry=redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 200)
            ) as client:
                assert client.get("key") == value
                client.set("key", "kept")
                assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            with pytest.raises(redis.AuthenticationError), redis.Redis(port=port, retry=None) as stranger:
                stranger.get("key")
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)


def _moved(text, places):
    for place, here in places.items():
        text = text.replace(place, str(here))
    return text
