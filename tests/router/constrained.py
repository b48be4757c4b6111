"""Constrained requests, and an engine run to the end of them."""

import json
from collections.abc import Iterable
from typing import Any

import torch

from model.tokenizer import Tokenizer
from router.constraint_compiler import GrammarCompiler, GrammarLimits
from router.engine import Engine, EngineConfig
from router.request import Constraint, Delta, Request, SamplingParams
from tests.reference.local_generation import LocalGenerator

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def json_schema(schema: Any) -> Constraint:
    return Constraint(kind="json_schema", value=json.dumps(schema))


def choice(*choices: str) -> Constraint:
    return Constraint(kind="choice", value=json.dumps(choices))


def regex(expression: str) -> Constraint:
    return Constraint(kind="regex", value=expression)


def make_grammars(local: LocalGenerator, tokenizer: Tokenizer, limits: GrammarLimits | None = None) -> GrammarCompiler:
    config = local.model.config
    return GrammarCompiler(lambda: tokenizer, config.vocab_size, config.eos_token_ids, limits)


def make_engine(local: LocalGenerator, grammars: GrammarCompiler | None, experts: Any = None, **sizes: int) -> Engine:
    config = EngineConfig(**{"num_pages": 512, "max_model_len": 1024, "max_batch_tokens": 256, "max_running": 64, **sizes})
    return Engine(local.model, experts or local.experts, config, torch.device("cpu"), grammars=grammars)


def make_request(
    name: str, constraint: Constraint | None, generated: Iterable[int] = (), prompt: Iterable[int] = (5, 6, 7), **sampling: Any
):
    settings = {"temperature": 0.0, "max_tokens": 400, "constraint": constraint, **sampling}
    return Request(
        request_id=name, prompt_token_ids=tuple(prompt), generated_token_ids=tuple(generated), sampling=SamplingParams(**settings)
    )


def run(engine: Engine, *requests: Request) -> dict[str, list[Delta]]:
    """All deltas of each request, by id."""
    for request in requests:
        engine.add(request)
    answers: dict[str, list[Delta]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for delta in engine.step():
            answers[delta.request_id].append(delta)
    return answers


def tokens_of(deltas: Iterable[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]
