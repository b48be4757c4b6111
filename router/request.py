"""What travels between gateway and router: a request with its sampling parameters, and the deltas that answer it."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "cancelled", "error"]
Finite = Annotated[float, Field(allow_inf_nan=False)]


ConstraintKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]


class Constraint(BaseModel):
    """What the answer's text must be an instance of; its tokens are chosen among those that can still lead there.

    `value` by kind: json_schema: the schema as JSON text; json_object: empty; regex: the expression, which the whole answer
    matches; choice: a JSON list of strings, of which the answer is one; grammar: a context-free grammar in Lark's syntax.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ConstraintKind
    value: str = ""


class SamplingParams(BaseModel):
    """How one sequence's tokens are chosen. The random number of position p depends on (seed, p) alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: Finite = Field(default=1.0, ge=0.0, description="0 is greedy.")
    top_p: Finite = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, description="0 or -1: all tokens.")
    min_p: Finite = Field(default=0.0, ge=0.0, le=1.0, description="Drops tokens less likely than min_p x the likeliest.")
    seed: int = Field(default=0, ge=-(2**63), lt=2**63, description="The gateway draws one where the client gives none.")
    presence_penalty: Finite = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: Finite = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: Finite = Field(default=1.0, gt=0.0, description="Over prompt and generated tokens, as in transformers.")
    logit_bias: dict[int, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(default_factory=dict)
    max_tokens: int = Field(default=16, ge=1)
    min_tokens: int = Field(default=0, ge=0, description="End and stop tokens cannot be chosen before this many.")
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20, description="None: none; n: the chosen token's and the n best.")
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    constraint: Constraint | None = Field(default=None, description="The end token is then chosen only where the answer may end.")


class Request(BaseModel):
    """One sequence to generate. `generated_token_ids` are those already sent to the client by a router that died."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_id: str
    prompt_token_ids: tuple[int, ...]
    generated_token_ids: tuple[int, ...] = ()
    sampling: SamplingParams
    deadline_s: float | None = Field(default=None, description="Seconds left when sent; clocks of two nodes are not compared.")
    traceparent: str | None = Field(default=None, description="W3C trace context of the gateway's span, where the call is traced.")


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural-log probability (of the model's own distribution, before any sampling change) and its rank (1 = best)."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True)
class PositionLogprobs:
    """At one position: the token that stands there, and the best alternatives, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Failure:
    """Why a request failed: the stable kind of its error and a sentence for a person."""

    kind: str
    message: str
    field: str | None = None


@dataclass(frozen=True)
class Delta:
    """What one step adds to one request.

    `logprobs` has one entry per new token where asked for; `prompt_logprobs` comes once, with the first delta, None for
    the prompt's first token. `finish` is set on the last delta only; with "error" and "cancelled", `failure` says why.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish: FinishReason | None = None
    failure: Failure | None = None
