"""Requests and answers to send, and the check that what arrives is equal."""

import torch
from hypothesis import strategies as st

from router.placement_map import MapVersion
from router.transport.frames import HIDDEN_DTYPES, ExpertsRequest


def make_request(num_tokens=3, hidden_size=5, top_k=2, dtype=torch.float32, seed=0, is_prefill=False, layer=7):
    generator = torch.Generator().manual_seed(seed)
    return ExpertsRequest(
        layer=layer,
        map_version=MapVersion(2, 9),
        hidden=torch.randn(num_tokens, hidden_size, generator=generator).to(dtype),
        expert_ids=torch.randint(-1, 256, (num_tokens, top_k), generator=generator, dtype=torch.int16),
        weights=torch.rand(num_tokens, top_k, generator=generator),
        is_prefill=is_prefill,
    )


requests = st.builds(
    make_request,
    num_tokens=st.integers(1, 9),
    hidden_size=st.integers(1, 17),
    top_k=st.integers(1, 8),
    dtype=st.sampled_from(list(HIDDEN_DTYPES.values())),
    seed=st.integers(0, 2**31),
    is_prefill=st.booleans(),
    layer=st.integers(0, 2**32 - 1),
)


def assert_equal_requests(left, right):
    assert (left.layer, left.map_version, left.is_prefill) == (right.layer, right.map_version, right.is_prefill)
    for name in ("hidden", "expert_ids", "weights"):
        a, b = getattr(left, name), getattr(right, name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name


def echo_partial(request):
    """What the echoing hosts of these tests answer: a sum that depends on every tensor of the request."""
    return request.hidden.float() * 2 + (request.weights * request.expert_ids).sum(1, keepdim=True)
