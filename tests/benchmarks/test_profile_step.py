"""Folding, judging and drawing of stacks, on made-up samples; what is recorded of real processes is `profile_step`'s to check."""

import re
from dataclasses import replace

import pytest

from tests.benchmarks.flame_graph import draw, fold, parse_stacks
from tests.benchmarks.growth.laws import StepLaw
from tests.benchmarks.peers.load import Answered
from tests.benchmarks.profile_parts import GATEWAY, HOST, OTHERS, ROUTER, WAITING, part_of, shares, shortened
from tests.benchmarks.profile_recording import RATE, Recording, ThreadTime
from tests.benchmarks.profile_report import NATIVE, Profiled, group_cores, part_samples, report, visible_stacks
from tests.benchmarks.profile_step import is_decode_only, pace_of

ENGINE = (
    "thread (7): engine",
    "Thread.run (threading.py:982)",
    "Engine.step (router/engine.py:200)",
    "run_forwards (router/forward.py:60)",
)
CHANNELS = ("thread (8): channels", "Thread.run (threading.py:982)", "Listener._run (router/transport/listener.py:139)")
LOOP = ("thread (9): Thread-1", "Wrapper.__init__.<locals>._run_user_code_event_loop (ray/serve/_private/replica.py:3746)")


def engine(*frames):
    return (*ENGINE, *frames)


@pytest.mark.parametrize(
    ("stack", "rules", "part"),
    [
        (engine("LatentAttention.__call__ (model/attention/mla.py:70)", "Linear.__call__ (model/layers.py:42)"), ROUTER, "dense products"),
        (engine("LatentAttention.__call__ (model/attention/mla.py:80)"), ROUTER, "attention"),
        (engine("LatentAttention._absorbed (m/mla.py:1)", "PagedCache.read (model/kv_cache.py:4)"), ROUTER, "latents read from the cache"),
        (
            engine("DistributedExperts.combine (router/dispatch.py:137)", "HostLinks.poll (router/host_links.py:115)"),
            ROUTER,
            "waiting for hosts",
        ),
        (engine("DistributedExperts.dispatch (router/dispatch.py:1)", "_amax (numpy/_methods.py:39)"), ROUTER, "dispatch and combine"),
        (engine("route (router/gating.py:10)"), ROUTER, "gating"),
        (engine(), ROUTER, "engine"),
        (CHANNELS, ROUTER, WAITING),
        (CHANNELS, HOST, WAITING),
        ((*CHANNELS, "ExpertSlots.forward (model/experts.py:2)", "LayerTable.run (model/cpu_experts.py:77)"), HOST, "experts kernel"),
        ((*CHANNELS, "InPlacePoll.poll (router/transport/in_place.py:9)"), HOST, "waiting for frames, reading and answering them"),
        (engine("QuickBatches.collect (router/quick_batches.py:1)"), ROUTER, "waiting for hosts"),
        (engine("Recording.replay (model/cpu_recording.py:1)"), ROUTER, "recorded layers"),
        ((*CHANNELS, "HostEnd.handle (router/transport/host_end.py:7)"), HOST, "frames in and out"),
        (LOOP, GATEWAY, WAITING),
        ((*LOOP, "Answer.push (cluster/api/answer.py:47)", "push (model/tokenizer.py:200)"), GATEWAY, "detokenising"),
        ((*LOOP, "assign_request (ray/serve/_private/router.py:1163)"), GATEWAY, OTHERS),
        (("thread (10)",), GATEWAY, WAITING),
    ],
)
def test_a_stack_belongs_to_its_innermost_known_frame(stack, rules, part):
    assert part_of(stack, rules) == part


def test_raw_stacks_are_read_back_and_equal_ones_added():
    text = "a (x.py:1);b c (y.py:2) 3\na (x.py:1);b c (y.py:2) 4\na (x.py:1) 1\n"
    stacks = parse_stacks(text)
    assert stacks == {("a (x.py:1)", "b c (y.py:2)"): 7, ("a (x.py:1)",): 1}
    with pytest.raises(ValueError, match="no samples"):
        parse_stacks("no samples here")


def test_a_frame_has_the_samples_of_what_it_called():
    root = fold({("a", "b"): 3, ("a", "c"): 1, ("a",): 2, ("d",): 4})
    assert root.samples == 10
    assert root.callees["a"].samples == 6
    assert root.callees["a"].callees["b"].samples == 3


def test_frames_are_as_wide_as_their_samples_within_their_caller_and_the_least_are_dropped(tmp_path):
    root = fold({("a", "<b>"): 600.0, ("a",): 200.0, ("c",): 199.0, ("never",): 1.0})
    draw(root, "title", "note", lambda samples: f"{samples:g} samples", lambda _: "#fff", tmp_path / "flame.svg")
    text = (tmp_path / "flame.svg").read_text()
    rects = re.findall(r"<title>([^:]+): (\d+) samples</title><rect x=\"([\d.]+)\" y=\"(\d+)\" width=\"([\d.]+)\"", text)
    found = {name: (int(samples), float(x), int(y), float(width)) for name, samples, x, y, width in rects}
    assert set(found) == {"a", "&lt;b&gt;", "c"}
    assert found["a"][3] / found["c"][3] == pytest.approx(800 / 199, rel=0.01)
    assert found["&lt;b&gt;"][1] == found["a"][1] == 0.0
    assert found["&lt;b&gt;"][2] > found["a"][2] == found["c"][2]
    assert found["c"][1] == pytest.approx(found["a"][3], abs=1)


def recording():
    made = Recording()
    stacks = {engine("route (router/gating.py:10)"): 40, engine("HostLinks.poll (router/host_links.py:115)"): 60, CHANNELS: 100, LOOP: 100}
    ran = {7: (40, 5), 8: (0, 0), 9: (10, 0), 11: (20, 0)}
    threads = {number: ThreadTime(on / RATE, wants / RATE) for number, (on, wants) in ran.items()}
    made.add(stacks, threads, 100 / RATE)
    return made


def test_what_a_parked_thread_ran_is_the_kernels_to_say():
    stacks = visible_stacks(recording(), ROUTER)
    assert sum(samples for stack, samples in stacks.items() if "gating" in stack[-1]) == 40
    assert stacks[NATIVE,] == pytest.approx(20)
    assert sum(samples for stack, samples in stacks.items() if stack[0] == "thread Thread-1") == pytest.approx(10)
    assert not any("channels" in stack[0] for stack in stacks)


def test_parts_fill_the_wall_time():
    assert sum(part_samples(recording(), ROUTER).values()) == pytest.approx(130)  # its threads ran for more than one core together
    assert part_samples(recording(), ROUTER)[WAITING] == 0
    few = Recording()
    few.add({(*CHANNELS, "LayerTable.run (model/cpu_experts.py:77)"): 30, CHANNELS: 70}, {8: ThreadTime(30 / RATE, 0.0)}, 100 / RATE)
    assert part_samples(few, HOST) == {"experts kernel": 30, WAITING: 70}
    assert shares(few.stacks, HOST) == {"experts kernel": 30, WAITING: 70}


def test_a_second_window_adds_to_the_first():
    twice = recording()
    twice.add(recording().stacks, recording().threads, 100 / RATE)
    assert twice.wall_s == 200 / RATE
    assert twice.threads[7] == ThreadTime(80 / RATE, 10 / RATE)
    assert part_samples(twice, ROUTER)["gating"] == 80


def test_the_report_tells_samples_as_milliseconds_of_a_step():
    host = Recording()
    host.add({(*CHANNELS, "LayerTable.run (model/cpu_experts.py:77)"): 30, CHANNELS: 70}, {8: ThreadTime(30 / RATE, 0.0)}, 100 / RATE)
    recordings = {"Router": recording(), "ExpertHost 1": host, "ExpertHost 2": host}
    text = report(Profiled(recordings, 0.05, 0.06, [("Router", 0.9), ("python -m ray", 0.1)], StepLaw(0.01, 0.01, 0.0, 61.0)))
    assert "| Router | gating | 20.00 | 40.0% |" in text
    assert "| Router | waiting for hosts | 30.00 | 60.0% |" in text
    assert "| ExpertHost 2 | experts kernel | 15.00 | 30.0% |" in text
    assert "its law is 20.0 ms" in text
    assert "on a core for 40% of the time, finds none free for 5% and sleeps for 55%" in text


def test_cores_are_told_by_what_they_are_for():
    cores = [("Router", 0.8), ("ExpertHost 1", 0.4), ("python -m tests.benchmarks.peers.load", 0.1), ("ray::X", 0.02), ("raylet", 0.03)]
    assert group_cores(cores) == [("Router", 0.8), ("ExpertHost 1", 0.4), ("clients", 0.1), ("Ray and Serve", pytest.approx(0.05))]


def test_a_wave_is_pure_only_between_the_last_first_token_and_the_first_last_one():
    answers = [Answered(0.0, (1.0, 1.1, 1.2, 1.3), 1.4, 4), Answered(0.0, (1.05, 1.15, 1.25, 1.35), 1.4, 4)]
    assert is_decode_only(answers, 1.06, 1.29)
    assert not is_decode_only(answers, 1.04, 1.29)
    assert not is_decode_only(answers, 1.06, 1.31)
    pace = pace_of(answers)
    assert pace.first_s == pytest.approx(1.05)
    assert pace.step_s == pytest.approx((0.25 / 3 + 0.1) / 2)
    two_tokens_an_event = [replace(answer, num_tokens=8) for answer in answers]
    assert pace_of(two_tokens_an_event).step_s == pytest.approx(pace.step_s / 2)


def test_threads_are_named_and_their_beginnings_left_out():
    assert shortened(engine()) == ("thread engine", "Engine.step (router/engine.py)", "run_forwards (router/forward.py)")
    assert shortened(("thread (10)", "f (g.py:3)")) == ("a thread without a name", "f (g.py)")
