"""The TCP channel to a host is cut between two network namespaces, and mended: streams of real weights go on."""

import os
import shutil
import threading
import time

import pytest

from cluster.client import get_json
from tests.cluster.conftest import App
from tests.cluster.namespaces import OPEN_RAY, two_nodes
from tests.cluster.serve_process import ServeProcess
from tests.cluster.streams import Streams, disturbed
from tests.cluster.test_failures import NUM_HOSTS, NUM_TOKENS, prompts, show, wait_until_whole
from tests.demo_checkpoint import demo_paths

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

CUT_S = 10.0


class ServedApp(App):
    """An application of a `shoal serve` of its own, looked at over HTTP."""

    def view(self):
        """The parts of the Coordinator's view that these tests read."""
        load = get_json(f"{self.http}/cluster/load")
        placement = get_json(f"{self.http}/cluster/placement")
        return {"hosts": get_json(f"{self.http}/cluster/hosts"), "placement": placement, "events": load.get("events", load)}


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2")
def test_a_cut_tcp_channel_is_noticed_by_no_stream(record_property, tmp_path, monkeypatch):
    for name, setting in OPEN_RAY.items():
        monkeypatch.setenv(name, setting)
    config = tmp_path / "shoal.yaml"
    config.write_text("placement: {min_replicas: 2}\nexpert_host: {cpus: 0, resources: {place: 1}}\nrouter: {resources: {near: 0.001}}\n")
    flags = ("--insecure", "--config", str(config), "--expert-hosts", str(NUM_HOSTS), "--name", "parted")
    nodes_with = two_nodes({"CPU": 4, "near": 1, "place": 2}, {"CPU": 0, "place": 1})
    with nodes_with as nodes, ServeProcess(demo_paths().mixtral, "--address", nodes.address, *flags) as served:
        app = ServedApp(served.name, served.http, served.grpc)
        wait_until_whole(app, 2)
        assert len({host["node_id"] for host in app.view()["hosts"]}) == 2
        undisturbed = Streams(app, prompts(), NUM_TOKENS).finish()
        mend = threading.Timer(CUT_S, nodes.mend)

        def cut() -> None:
            nodes.cut()
            mend.start()

        try:
            show(record_property, disturbed("TCP channel cut for 10 s", app, prompts(), undisturbed, cut))
        finally:
            mend.join()
        until = time.monotonic() + 60
        while len(app.view()["hosts"]) < NUM_HOSTS:
            assert time.monotonic() < until
            time.sleep(0.5)
