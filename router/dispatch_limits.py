"""How long a batch waits for hosts, and how often it is sent again."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DispatchLimits:
    """Times in seconds. A slow host is waited for until `step_timeout_s`; where there is a replica, only `resend_after_s`.

    A host that leaves a PING unanswered for `silent_after_s` is suspect: where there is a replica its work goes there, and nothing
    is closed, so that a mistake costs no more than that work.
    """

    step_timeout_s: float = 30.0
    silent_after_s: float = 0.2
    resend_after_s: float = 2.0
    max_resent_share: float = 0.03  # of all frames; slowness everywhere must not double the load
    max_failures: int = 2  # FAILED answers to one part
    max_deaths: int = 2  # hosts that die with one part in hand; as many may fall silent before it goes to no other
    min_backoff_s: float = 0.001  # after BUSY; doubles
    max_backoff_s: float = 0.05
    retry_interval_s: float = 0.005  # how often a part without any host looks for one
    look_interval_s: float = 0.05  # how often a batch without its answers looks after the hosts that owe them
    reconnect_interval_s: float = 0.25
    num_cores: int | None = None  # that router and hosts share; None: as many as this process may run on
    decode_tokens: int = 128  # frames up to this size count as decodes, and go first at the host
