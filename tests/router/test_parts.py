"""Grouping by host against the obvious loops."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from router.grouping import FEW_SPARED, NOBODY, NOT_WANTED
from router.parts import group_by_host


@given(st.data())
def test_groups_hold_every_choice_once_and_every_token_once_a_host(data: st.DataObject):
    num_hosts = data.draw(st.integers(1, 4))
    num_experts = data.draw(st.integers(1, 8))
    num_tokens, top_k = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 4))
    host_of = data.draw(st.lists(st.integers(NOBODY, num_hosts - 1), min_size=num_experts, max_size=num_experts))
    ids = data.draw(st.lists(st.integers(-1, num_experts - 1), min_size=num_tokens * top_k, max_size=num_tokens * top_k))
    expert_ids = torch.tensor(ids, dtype=torch.int16).view(num_tokens, top_k)
    groups = group_by_host(expert_ids, np.array([*host_of, NOT_WANTED])[expert_ids.numpy()], num_hosts)

    expected: dict[int, dict[int, list[int]]] = {}
    for token, row in enumerate(expert_ids.tolist()):
        for place, expert in enumerate(row):
            if expert >= 0:
                mine = expected.setdefault(host_of[expert], {}).setdefault(token, [-1] * top_k)
                mine[place] = expert
    assert [group.host for group in groups] == sorted(expected)
    for group in groups:
        wanted = expected[group.host]
        if num_tokens - len(wanted) <= num_tokens // FEW_SPARED:
            assert group.rows is None
            assert group.expert_ids.tolist() == [wanted.get(token, [-1] * top_k) for token in range(num_tokens)]
        else:
            assert dict(zip(group.rows.tolist(), group.expert_ids.tolist(), strict=True)) == wanted
