"""Routers step by step in simulated time, as one compiled loop: what a discrete-event simulation of the data loop needs and no more.

A router does what the engine does: a step takes each running sequence's next token and fills up with prompt tokens, first come
first served, to `max_batch_tokens`; the next step begins when this one ends. A step of T tokens lasts A + E + W:
- A, the router's own: hops, the dense part (the slower of computing T tokens and reading the weights once) and attention.
- E, the busiest host's time over all layers for T tokens alone, from a table that `hosts.py` makes with planner and replica choice.
- W, waiting for the frames of other routers at the hosts. Frames are served first come first served, so a frame that arrives finds
  router j's frame there with the probability q_j = (E_j + W_j) / (A_j + E_j + W_j), and waits for it: W = sum of q_j E_j over the other
  routers in a step. This is Bard and Schweitzer's approximate mean value analysis (Schweitzer 1979) of a closed network, step by step;
  it saturates at the hosts' capacity. Merging frames of different routers, which would save activations, is not counted.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

# Columns of `now` [R, COLUMNS], one router's state: when its step ends (inf: idle), what it adds to the hosts' pressure, prompt tokens to
# go, running sequences, KV tokens they will need at most, first and last request that waits (-1: none), whether it takes new ones.
END, PRESSURE, PENDING, RUNNING, KV, HEAD, TAIL, ACCEPTS = range(8)
COLUMNS = 8
# Rows of `sums`, since whoever reads them set them to zero: mean host's seconds of work, waiting of all steps, steps, tokens.
HOST_WORK, WAIT, STEPS, TOKENS = range(4)


class Costs(NamedTuple):
    """Seconds of a router's step, and the engine's limits; see `constants.py`."""

    step_s: float
    weights_s: float
    token_s: float
    pair_s: float
    context_s: float
    front_s: float
    max_batch_tokens: int
    kv_capacity: int
    ttft_s: float  # what counts as late
    tpot_s: float


class State(NamedTuple):
    """Everything that changes, R routers and N requests; `slots` and `planned` [R, max_running]; `pressure` [1] the sum of q_j E_j;

    `late` [2] counts requests past the targets for the first token and for those after it.
    """

    now: NDArray[np.float64]
    slots: NDArray[np.int64]
    planned: NDArray[np.int64]
    busy_s: NDArray[np.float64]
    sums: NDArray[np.float64]
    pressure: NDArray[np.float64]
    late: NDArray[np.int64]
    next_waiting: NDArray[np.int64]
    prompt_done: NDArray[np.int64]
    generated: NDArray[np.int64]
    first_s: NDArray[np.float64]
    done_s: NDArray[np.float64]


def new_state(num_routers: int, num_requests: int, max_running: int) -> State:
    """All routers idle and closed."""
    now = np.zeros((num_routers, COLUMNS))
    now[:, END] = np.inf
    now[:, HEAD] = now[:, TAIL] = -1
    slots = np.zeros((num_routers, max_running), dtype=np.int64)
    late, counts = np.zeros(2, dtype=np.int64), [np.zeros(num_requests, dtype=np.int64) for _ in range(3)]
    times = [np.full(num_requests, np.inf) for _ in range(2)]
    return State(now, slots, np.zeros_like(slots), np.zeros(num_routers), np.zeros(4), np.zeros(1), late, *counts, *times)


@njit(cache=True)
def advance(until_s, position, state, arrival_s, prompt, answer, busiest_s, mean_s, costs):
    """Runs all routers until `until_s`. `position`: the next arrival, before and (returned) after; `busiest_s`, `mean_s` [T + 1]: hosts."""
    now = state.now
    while True:
        router, at_s = -1, until_s
        for r in range(now.shape[0]):
            if now[r, END] < at_s:
                router, at_s = r, now[r, END]
        if position < len(arrival_s) and arrival_s[position] + costs.front_s <= at_s:
            at_s = arrival_s[position] + costs.front_s
            router = _choose(now)
            _enqueue(router, position, state, prompt)
            position += 1
            if now[router, END] < np.inf:
                continue
        elif router < 0:
            return position
        else:
            _finish(router, at_s, state, arrival_s, prompt, answer, costs)
        _begin(router, at_s, state, prompt, answer, busiest_s, mean_s, costs)


@njit(cache=True)
def _choose(now):
    """The gateway's choice: fewest prompt tokens to go, a running sequence counting as 16."""
    best, fewest = -1, np.inf
    for r in range(now.shape[0]):
        if now[r, ACCEPTS] > 0 and now[r, PENDING] + 16 * now[r, RUNNING] < fewest:
            best, fewest = r, now[r, PENDING] + 16 * now[r, RUNNING]
    return best


@njit(cache=True)
def _enqueue(router, request, state, prompt):
    now = state.now
    state.next_waiting[request] = -1
    if now[router, HEAD] < 0:
        now[router, HEAD] = request
    else:
        state.next_waiting[int(now[router, TAIL])] = request
    now[router, TAIL] = request
    now[router, PENDING] += prompt[request]


@njit(cache=True)
def _begin(router, at_s, state, prompt, answer, busiest_s, mean_s, costs):
    """The next step of one router, or idleness where it has nothing to do."""
    now, slots, planned = state.now, state.slots[router], state.planned[router]
    running, left, pairs, context = int(now[router, RUNNING]), costs.max_batch_tokens, 0.0, 0.0
    for place in range(running):
        request = slots[place]
        planned[place] = 0
        if state.prompt_done[request] == prompt[request]:
            planned[place] = 1
            context += prompt[request] + state.generated[request]
            left -= 1
    for place in range(running):
        request = slots[place]
        if left > 0 and state.prompt_done[request] < prompt[request]:
            chunk = min(left, prompt[request] - state.prompt_done[request])
            planned[place] = chunk
            pairs += chunk * (state.prompt_done[request] + 0.5 * chunk)
            left -= chunk
    while left > 0 and now[router, HEAD] >= 0 and running < len(slots):
        request = int(now[router, HEAD])
        if now[router, KV] + prompt[request] + answer[request] > costs.kv_capacity:
            break
        now[router, HEAD] = state.next_waiting[request]
        now[router, KV] += prompt[request] + answer[request]
        chunk = min(left, prompt[request])
        slots[running], planned[running] = request, chunk
        pairs += 0.5 * chunk * chunk
        left -= chunk
        running += 1
    now[router, RUNNING] = running
    if running == 0:
        now[router, END] = np.inf
        return
    tokens = costs.max_batch_tokens - left
    own_s = costs.step_s + max(tokens * costs.token_s, costs.weights_s) + pairs * costs.pair_s + context * costs.context_s
    wait_s = state.pressure[0]
    hosts_s = busiest_s[tokens] + wait_s
    now[router, PRESSURE] = hosts_s / (own_s + hosts_s) * busiest_s[tokens]
    state.pressure[0] += now[router, PRESSURE]
    now[router, END] = at_s + own_s + hosts_s
    state.busy_s[router] += own_s + hosts_s
    state.sums[HOST_WORK] += mean_s[tokens]
    state.sums[WAIT] += wait_s
    state.sums[STEPS] += 1
    state.sums[TOKENS] += tokens


@njit(cache=True)
def _finish(router, at_s, state, arrival_s, prompt, answer, costs):
    """A step's end: prompts move on, tokens come out, sequences that have all of theirs leave; the order of the others stays."""
    now, slots, planned = state.now, state.slots[router], state.planned[router]
    state.pressure[0] = max(0.0, state.pressure[0] - now[router, PRESSURE])
    kept = 0
    for place in range(int(now[router, RUNNING])):
        request, tokens = slots[place], planned[place]
        is_decode = state.prompt_done[request] == prompt[request]
        if not is_decode:
            state.prompt_done[request] += tokens
            now[router, PENDING] -= tokens
        if is_decode or state.prompt_done[request] == prompt[request]:
            state.generated[request] += 1
            if state.generated[request] == 1:
                state.first_s[request] = at_s
                state.late[0] += at_s - arrival_s[request] > costs.ttft_s
            if state.generated[request] == answer[request]:
                state.done_s[request] = at_s
                state.late[1] += at_s - state.first_s[request] > costs.tpot_s * (answer[request] - 1)
                now[router, KV] -= prompt[request] + answer[request]
                continue
        slots[kept] = request
        kept += 1
    now[router, RUNNING] = kept
