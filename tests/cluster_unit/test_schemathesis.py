"""schemathesis attacks the door by its own OpenAPI document: no answer is a 5xx, and every status is one that the document names."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode

from cluster.api.http import http_app
from model.tokenizer import Tokenizer
from tests.cluster_unit.front_door import MODEL, STILL, make_service, says
from tests.model.tiny_tokenizer import write_byte_level

OURS = "^/(v1|tokenize|detokenize|health|ready)"
# The document's other paths show what Ray or the Coordinator says, which a made-up one here does not.


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    tokenizer = Tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))
    service, _ = make_service(tokenizer, says([*tokenizer.encode("hello"), 1]), max_model_len=512)
    return http_app(service, STILL, lambda: True)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_that_the_document_allows_or_forbids_ends_in_5xx(app, mode):
    operations = schemathesis.openapi.from_asgi("/openapi.json", app).include(path_regex=OURS).get_all_operations()
    attacked = set()
    for operation in (found.ok() for found in operations):
        if mode is GenerationMode.POSITIVE or operation.method.upper() == "POST":  # a GET has nothing that could be wrong
            attack(operation, app.openapi()["paths"][operation.path][operation.method.lower()]["responses"], mode)
            attacked.add(operation.path)
    assert {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"} <= attacked


def attack(operation, documented, mode):
    @settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def once(case):
        if isinstance(case.body, dict) and "model" in case.body and mode is GenerationMode.POSITIVE:
            case.body["model"] = MODEL  # else every request ends as one for an unknown model
        response = case.call()
        assert response.status_code < 500, response.text
        assert str(response.status_code) in documented or response.status_code == 405, response.status_code
        if response.status_code >= 400:
            assert set(json.loads(response.text)["error"]) == {"message", "type", "param", "code"}

    once()
