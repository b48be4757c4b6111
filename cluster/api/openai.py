"""What OpenAI's API takes, as schemas, and the call that a completions request means. Bounds are those of SamplingParams.

A field's description says what it does. One that begins with "Ignored" is taken without effect, and a field of the type NotServed
refuses any value but null: the README's table of parameters is made from these.
"""

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from cluster.api.constraints import GuidedFields, constraint_of
from cluster.api.schema import Schema
from cluster.api.service import Call
from router.errors import InvalidRequest
from router.request import SamplingParams

# A part of OpenAI's API that is not served: null is let through, a value is refused by name.
NotServed = Annotated[None, Field(description="Not served: leave it out.")]
SAME_NAME = (
    "temperature",
    "top_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "prompt_logprobs",
)
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def show_bounds(schema: dict[str, Any]) -> None:
    """Writes the sampler's bounds into a JSON schema, so that the OpenAPI document says what is refused."""
    sampling = SamplingParams.model_json_schema()["properties"]
    for name in SAME_NAME:
        if name not in schema["properties"]:
            continue
        kinds = {kind.get("type"): kind for kind in (sampling[name], *sampling[name].get("anyOf", ()))}
        for kind in schema["properties"][name].get("anyOf", ()):
            # A 64-bit seed's bounds are not numbers that every JSON reader keeps exact; the integer type says enough.
            if kind.get("type") in kinds and name != "seed":
                kind.update({bound: kinds[kind["type"]][bound] for bound in _BOUNDS if bound in kinds[kind["type"]]})


class StreamOptions(Schema):
    """Of a streamed answer."""

    include_usage: bool = Field(False, description="Sends the usage in a last chunk, without choices.")
    include_obfuscation: bool | None = Field(None, description="Ignored: nothing is padded.")


class GenerationRequest(GuidedFields):
    """What completions and chat share. The names are OpenAI's, those it lacks are vLLM's."""

    model_config = ConfigDict(json_schema_extra=show_bounds)

    model: str = Field(description="The model's id, as /v1/models has it.")
    n: int | None = Field(None, ge=1, description="Answers to each prompt; answer i has the seed plus i.")
    stop: str | list[str] | None = Field(None, description="Ends the answer before the first of these strings.")
    stream: bool | None = Field(None, description="Sends the answer as server-sent events while it is made.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    seed: int | None = Field(None, description="The same seed draws the same answer; without one it is drawn at random.")
    temperature: float | None = Field(None, description="0 takes the likeliest token each time; 1 if left out.")
    top_p: float | None = Field(None, description="Draws from the likeliest tokens that have this share together.")
    presence_penalty: float | None = Field(None, description="Taken from the logit of each token generated before.")
    frequency_penalty: float | None = Field(None, description="Taken from a token's logit as often as it was generated before.")
    logit_bias: dict[str, float] | None = Field(None, description="Added to the logits of these token ids, -100 to 100.")
    max_tokens: int | None = Field(None, description="Most tokens of an answer; completions: 16 if left out, chat: what the model takes.")
    top_k: int | None = Field(None, description="Draws from so many of the likeliest tokens; 0 or -1: all.")
    min_p: float | None = Field(None, description="Drops tokens less likely than this share of the likeliest.")
    repetition_penalty: float | None = Field(None, description="Divides the logits of tokens of the prompt and the answer.")
    min_tokens: int | None = Field(None, description="The answer does not end before so many tokens.")
    ignore_eos: bool | None = Field(None, description="Goes on past the model's end token.")
    stop_token_ids: list[int] | None = Field(None, description="Ends the answer at the first of these tokens.")
    prompt_logprobs: int | None = Field(None, description="Log-probabilities of the prompt's tokens, and so many alternatives.")
    return_token_ids: bool | None = Field(None, description="Sends token ids beside the text.")
    user: str | None = Field(None, description="Ignored: who asks is told by the key.")


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text or its token ids, or a list of either: n answers to each."
    )
    echo: bool | None = Field(None, description="Begins the answer with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=20, description="Log-probabilities of the tokens, and so many alternatives.")
    best_of: int | None = Field(None, description="Refused unless equal to n: no answer is made to be thrown away.")
    suffix: NotServed = None


def completion_call(body: CompletionRequest, request_id: str, deadline_s: float | None, deadline_name: str) -> Call:
    """The call that a completions request means. InvalidRequest where its fields contradict each other."""
    check_stream_options(body.stream, body.stream_options)
    n = 1 if body.n is None else body.n
    if body.best_of is not None and body.best_of != n:
        raise InvalidRequest("best_of: choosing among answers is not served; leave it out or make it equal to n.", field="best_of")
    names = {"deadline_s": deadline_name}
    sampling = sampling_of(body, names)
    sampling["logprobs"] = body.logprobs
    if body.echo and body.logprobs is not None:
        sampling["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    prompts = _prompts(body.prompt)
    return Call(request_id, body.model, prompts, None, sampling, stops_of(body.stop), n, deadline_s, names)


def check_stream_options(stream: bool | None, options: object) -> None:
    """InvalidRequest for options of a stream that is none."""
    if options is not None and not stream:
        raise InvalidRequest("stream_options: needs stream to be true.", field="stream_options")


def sampling_of(body: GenerationRequest, names: dict[str, str]) -> dict[str, Any]:
    """The parameters given, by SamplingParams' names; notes in `names` what the client calls its constraint."""
    values: dict[str, Any] = {name: getattr(body, name) for name in SAME_NAME}
    if body.logit_bias is not None:
        if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in body.logit_bias):
            raise InvalidRequest("logit_bias: its keys must be token ids.", field="logit_bias")
        values["logit_bias"] = {int(key): bias for key, bias in body.logit_bias.items()}
    found = constraint_of(body)
    if found is not None:
        names["constraint"], values["constraint"] = found
    return values


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop strings, however they were written."""
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if prompt and isinstance(prompt[0], int):
        return (tuple(token for token in prompt if isinstance(token, int)),)
    return tuple(part if isinstance(part, str) else tuple(part) for part in prompt if not isinstance(part, int))
