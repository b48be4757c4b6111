"""Grouping by host against the obvious loops."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from router.parts import NOBODY, NOT_WANTED, group_by_host


@given(st.data())
def test_groups_hold_every_choice_once_and_every_token_once_a_host(data: st.DataObject):
    num_hosts = data.draw(st.integers(1, 4))
    num_experts = data.draw(st.integers(1, 8))
    num_tokens, top_k = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 4))
    host_of = data.draw(st.lists(st.integers(NOBODY, num_hosts - 1), min_size=num_experts, max_size=num_experts))
    ids = data.draw(st.lists(st.integers(-1, num_experts - 1), min_size=num_tokens * top_k, max_size=num_tokens * top_k))
    expert_ids = torch.tensor(ids, dtype=torch.int16).view(num_tokens, top_k)
    groups = group_by_host(expert_ids, np.array([*host_of, NOT_WANTED])[expert_ids.numpy()])

    expected: dict[int, dict[int, list[int]]] = {}
    for token, row in enumerate(expert_ids.tolist()):
        for place, expert in enumerate(row):
            if expert >= 0:
                mine = expected.setdefault(host_of[expert], {}).setdefault(token, [-1] * top_k)
                mine[place] = expert
    assert [group.host for group in groups] == sorted(expected)
    for group in groups:
        rows = list(range(num_tokens)) if group.rows is None else group.rows.tolist()
        assert dict(zip(rows, group.expert_ids.tolist(), strict=True)) == expected[group.host]
