"""A new cluster beside the old one, as KubeRay upgrades: both under one name with one Redis and one secret, and no stream notices.

What becomes of streams on the old cluster when it ends is what becomes of them when a node leaves and when the head is lost.
"""

import os
import secrets
import signal

import pytest
import redis
import yaml

from tests.cluster.conftest import App
from tests.cluster.load import Load, ask_all
from tests.cluster.serve_process import ServeProcess
from tests.cluster_unit.redis_server import BINARY, RedisServer
from tests.tiny_models import write_tiny

pytestmark = pytest.mark.cluster

NUM_TOKENS = 32
PAUSE_S = 0.2  # two Rays start on as few cores as a test has
PROMPTS = [tuple(range(start, start + 6)) for start in range(5, 9)]


def app(serve: ServeProcess) -> App:
    return App(serve.name, serve.http, serve.grpc)


@pytest.mark.skipif(BINARY is None, reason="redis-server is not installed")
def test_a_new_cluster_takes_over_and_no_stream_notices(tmp_path):
    model = write_tiny("v2-lite", tmp_path / "model")
    with RedisServer(tmp_path, password=secrets.token_hex()) as server:
        settings = tmp_path / "shoal.yaml"
        settings.write_text(yaml.safe_dump({"name": "blue", "state_store": {"redis_url": f"redis://127.0.0.1:{server.port}/1"}}))
        # As the pods have them: neither is in the settings.
        environment = {**os.environ, "SHOAL_REDIS_PASSWORD": str(server.password), "SHOAL_SECRET": secrets.token_hex()}
        flags = ("--config", str(settings), "--insecure")
        with ServeProcess(model, *flags, environment=environment) as old:
            answers = ask_all(app(old), PROMPTS, NUM_TOKENS)
            with Load(app(old), answers, 1, NUM_TOKENS, PAUSE_S) as on_old:
                with ServeProcess(model, *flags, environment=environment) as new, Load(app(new), answers, 1, NUM_TOKENS, PAUSE_S) as on_new:
                    assert ask_all(app(new), PROMPTS, NUM_TOKENS) == answers
                    on_old.__exit__()
                    assert old.stop(signal.SIGTERM) == 0
                    assert ask_all(app(new), PROMPTS, NUM_TOKENS) == answers
                assert (on_old.problems, on_new.problems) == ([], [])
                assert min(on_old.num_answers, on_new.num_answers) >= len(PROMPTS)
        with redis.Redis(port=server.port, password=server.password, db=1, decode_responses=True) as store:
            kept = store.keys("shoal:blue:*:state")
        assert len(kept) == 2, "each cluster keeps its own state"
