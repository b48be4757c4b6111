"""Counting choices."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from router.expert_load import ExpertLoad


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 9), min_size=1, max_size=8)), max_size=8))
def test_counts_until_taken(batches):
    load = ExpertLoad()
    expected: Counter = Counter()
    for layer, ids in batches:
        num_experts = load.count(layer, np.array(ids, dtype=np.int16).reshape(-1, 1), 4)
        assert num_experts == max(4, max(ids) + 1)
        expected.update((layer, expert) for expert in ids)
    assert load.take() == expected
    assert load.take() == {}
