"""Which part of a decode step a stack belongs to: judged from the innermost frame outwards, by the file and function it is in."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from tests.benchmarks.flame_graph import Stack

# (part, pattern of a frame as py-spy writes it: `Class.function (file:line)`); of a stack's innermost frame that any matches, the first.
Rules: TypeAlias = Sequence[tuple[str, str]]
WAITING = "waiting"
# A thread whose innermost frame is one of these stands still, or is in code that Python does not see.
_PARKED = re.compile(
    r"^(Listener\._run|ExpertServer\._take_arrived|Thread\.run|_worker|Worker\.main_loop|Worker\.get_objects|<module>|"
    r".*_run_(user_code|router)_event_loop|[\w.<>]*(wait|poll|select|sleep|acquire|recv|accept)\w*) \("
)
_THREAD = re.compile(r"^thread \((\d+)\)(?:: (.*))?$")
_LINE = re.compile(r":\d+\)$")

ROUTER: Rules = (
    ("waiting for hosts", r"HostLinks\.\w*(poll|wait)|DistributedExperts\._(collect|await|wait_for)\w* |QuickBatches\.collect"),
    ("recorded layers", r"model/(cpu_recording|recorded_decode)"),
    ("dense products", r"Linear\.__call__|model/cpu_product"),
    ("latents read from the cache", r"PagedCache\.read"),
    ("attention", r"model/attention|model/kv_cache|model/rope|model/cpu_rope|model/cpu_attention|model/cpu_prefill"),
    ("gating", r"router/gating|model/gate|model/cpu_gate"),
    ("dispatch and combine", r"router/(dispatch|quick_batches|parts|host_links|replica|expert_load|transport/)"),
    ("sampling", r"model/(sampling|logprobs)|Engine\._sample"),
    ("scheduler and batch", r"router/(scheduler|sequence|kv_blocks|step)"),
    ("deltas to gateways", r"router/(service|wire|request)"),
    ("norms, sums, activations", r"model/layers|model/architectures|model/batch|model/cpu_norm|model/cpu_silu|model/cpu_add"),
    ("engine", r"router/(engine|forward|micro_batches)"),
)
HOST: Rules = (
    # Machine code does all three in one call, and Python's stack does not tell which: the thread's own time does.
    ("waiting for frames, reading and answering them", r"InPlacePoll\.poll"),
    ("experts kernel", r"model/cpu_\w+\.py|LayerTable\.|swiglu"),
    ("grouping, large groups", r"model/experts"),
    ("frames in and out", r"router/(expert_server|transport/)"),
    ("reports to the Coordinator", r"actors/"),
)
GATEWAY: Rules = (
    ("deltas from routers", r"router/wire|router/transport|cluster/router_pool|router/request"),
    ("detokenising", r"model/tokenizer|cluster/api/answer"),
    ("metrics", r"cluster/metrics"),
    ("HTTP and events", r"cluster/api|starlette|uvicorn|fastapi|json/"),
    ("reports to the Coordinator", r"actors/"),
)
OTHERS = "Ray, asyncio, the rest"


def thread_of(stack: Stack) -> tuple[int, str]:
    """The thread's id and name, which py-spy puts outermost; id 0 for a stack without."""
    found = _THREAD.match(stack[0])
    return (int(found[1]), found[2] or "") if found else (0, "")


def part_of(stack: Stack, rules: Rules) -> str:
    """The part's name; WAITING for a thread that is parked, unless a rule claims the very frame in which it is."""
    leaf = stack[-1]
    for frame in reversed(stack):
        for part, pattern in rules:
            if re.search(pattern, frame):
                return WAITING if _PARKED.match(leaf) and not part.startswith(WAITING) else part
    return WAITING if _PARKED.match(leaf) or len(stack) == 1 else OTHERS


def shares(stacks: Mapping[Stack, int], rules: Rules) -> dict[str, int]:
    """Samples of each part."""
    found: dict[str, int] = {}
    for stack, samples in stacks.items():
        part = part_of(stack, rules)
        found[part] = found.get(part, 0) + samples
    return found


def shortened(stack: Stack) -> Stack:
    """For the picture: the thread by its name, without line numbers and without how threads begin."""
    number, name = thread_of(stack)
    frames = [_LINE.sub(")", frame) for frame in stack[1 if number else 0 :] if "(threading.py" not in frame or frame == stack[-1]]
    return ((f"thread {name}" if name else "a thread without a name"), *frames) if number else tuple(frames)
