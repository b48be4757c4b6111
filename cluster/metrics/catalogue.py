"""Every counter and histogram that members report, by its name without the prefix `shoal_`.

Where vLLM has the series the rest of the name is its own, and its buckets are among ours.
"""

from dataclasses import dataclass

from router.histogram import REQUEST_BOUNDS_S


@dataclass(frozen=True)
class Family:
    """`labels` beside `model_name`."""

    text: str
    labels: tuple[str, ...] = ()


COUNTERS: dict[str, Family] = {
    "requests_total": Family("Answers asked for: one for each prompt and each of its n."),
    "request_success_total": Family("Answers that ended: stop, length, abort (the client went away) or error.", ("finished_reason",)),
    "request_failures_total": Family("Calls that were refused or failed, by the kind in their error.", ("kind",)),
    "request_resubmissions_total": Family("Answers that went on at another router after theirs had died."),
    "prompt_tokens_total": Family("Tokens of prompts, counted with the answer's first token."),
    "generation_tokens_total": Family("Tokens generated, as gateways pass them on."),
    "num_preemptions_total": Family("Sequences that gave their KV pages back to older ones."),
    "router_steps_total": Family("Steps of all routers' engines."),
    "router_split_steps_total": Family("Steps that ran as two micro-batches: one's attention beside the other's experts."),
    "router_step_seconds_total": Family("Seconds that routers were in a step."),
    "router_prefill_tokens_total": Family("Prompt tokens computed, those computed again after a preemption included."),
    "router_generated_tokens_total": Family("Tokens sampled by routers."),
    "dispatch_frames_total": Family("Frames of tokens that routers sent to expert hosts."),
    "dispatch_resends_total": Family(
        "Parts of a batch that had to go out anew: their host was lost, silent or slow (failovers), or answered busy, not_here or "
        "failed; or its channel was full, or no host was to be reached.",
        ("reason",),
    ),
    "host_calls_total": Family("Calls of the experts' kernels."),
    "host_tokens_total": Family("Tokens that hosts got and computed; one that needs experts of two hosts counts twice."),
    "host_busy_seconds_total": Family("Seconds that hosts computed."),
    "host_refused_frames_total": Family("Frames that hosts did not compute: busy, not_here, failed or cancelled.", ("reason",)),
    "scaling_decisions_total": Family(
        "Changes of a role's number of replicas, up or down, by the signal or bound that asked for them.", ("role", "direction", "reason")
    ),
}
# Label values that are shown from the start, at 0, so that the first of their kind is a step and not a beginning.
KNOWN: dict[str, tuple[str, ...]] = {
    "request_success_total": ("stop", "length", "abort", "error"),
    "request_failures_total": (
        *("queue_full", "rate_limited", "deadline_exceeded", "no_router", "not_ready", "experts_unavailable", "poisoned"),
        *("coordinator_away", "internal"),
    ),
    "dispatch_resends_total": ("lost", "silent", "slow", "busy", "not_here", "failed", "channel_full", "no_host"),
    "host_refused_frames_total": ("busy", "not_here", "failed", "cancelled"),
}
SUMMARIES: dict[str, Family] = {
    "dispatch_queue_wait_seconds": Family("Time that frames waited at their hosts before they were computed."),
}
HISTOGRAMS: dict[str, Family] = {
    "time_to_first_token_seconds": Family("From a call's arrival at the gateway to the first token of each answer."),
    "inter_token_latency_seconds": Family("Between two deltas of one answer, at the gateway."),
    "e2e_request_latency_seconds": Family("From a call's arrival at the gateway to the end of each answer."),
    "request_queue_time_seconds": Family("From a request's arrival at its router to its first step."),
    "request_prompt_tokens": Family("Tokens of the prompt of each answer."),
    "request_generation_tokens": Family("Tokens of each answer."),
}
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
BOUNDS: dict[str, tuple[float, ...]] = {
    "time_to_first_token_seconds": (
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
        *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640),
    ),
    "inter_token_latency_seconds": (
        *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
        *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
    ),
    "e2e_request_latency_seconds": REQUEST_BOUNDS_S,
    "request_queue_time_seconds": REQUEST_BOUNDS_S,
    "request_prompt_tokens": _TOKENS,
    "request_generation_tokens": _TOKENS,
}
