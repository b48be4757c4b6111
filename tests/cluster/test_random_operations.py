"""A short run of random operations; `python -m tests.benchmarks.disturbances` does 200 on real weights."""

import pytest

from tests.cluster.conftest import Shoals
from tests.cluster.load import Load
from tests.cluster.random_operations import SETTINGS, is_consistent, run_operations
from tests.cluster.test_scaling import NUM_TOKENS, right_answers, wait_for
from tests.tiny_models import write_tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_random_operations_end_consistent_and_fail_no_request(shoals: Shoals, tmp_path, record_property):
    with shoals.running(write_tiny("v2-lite", tmp_path / "v2-lite"), "unlucky", **SETTINGS) as app:
        answers = right_answers(app)
        with Load(app, answers, num_clients=4, num_tokens=NUM_TOKENS) as load:
            done = run_operations(app, number=16, seed=1)
            wait_for(lambda: is_consistent(app, 3), app, 90)
        record_property("operations", dict(done))
        print(dict(done), f"{load.num_answers} answers")
        assert load.num_answers > 0
        assert not load.problems
