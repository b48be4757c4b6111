"""PyPI's llm-comply, which holds the answers of an OpenAI server against OpenAI's own schemas, over real HTTP."""

import json

import llm_comply
import pytest
from llm_comply.config import ComplianceConfig
from llm_comply.runner import TestRunner as Checks
from llm_comply.schema import SpecLoader
from llm_comply.tests.open_responses import OPEN_RESPONSES_TESTS
from llm_comply.tests.openai_chat import OPENAI_CHAT_TESTS

from cluster.api.http import http_app
from model.tokenizer import Tokenizer
from tests.cluster_unit.front_door import MODEL, STILL, make_service, says
from tests.cluster_unit.http_server import serving
from tests.model.tiny_tokenizer import write_byte_level

SPECS = llm_comply.__path__[0] + "/specs/"
# The models that we serve read text; that an image is refused by its field is what these two then see.
IMAGES = {"chat-image-input", "image-input"}
# Its checks of reasoning run against model names of one maker only; an endpoint that compacts what we never stored is not ours.
SKIPPED = {"chat-reasoning-summary", "reasoning-summary"}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    tokenizer = Tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))
    call = json.dumps([{"name": "get_weather", "parameters": {"location": "Paris"}}])

    def script(request):
        text = "hello world" if request.sampling.constraint is None else call
        return says([*tokenizer.encode(text), 1])(request)

    service, _ = make_service(tokenizer, script, max_model_len=2048)
    with serving(http_app(service, STILL, lambda: True)) as address:
        yield address


@pytest.mark.filterwarnings("ignore:jsonschema.RefResolver is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("spec", "cases"), [("openai_chat.json", OPENAI_CHAT_TESTS), ("openresponses.json", OPEN_RESPONSES_TESTS)])
def test_all_that_is_about_text_passes(address, spec, cases):
    config = ComplianceConfig(f"{address}/v1", "none", model=MODEL, verbose=True, timeout=20)
    results = Checks(config, cases, SpecLoader(SPECS + spec)).run_all().results
    assert {result.id for result in results if result.status.name == "SKIPPED"} <= SKIPPED
    failed = {result.id: result for result in results if result.status.name == "FAILED"}
    assert set(failed) <= IMAGES, {name: (result.errors, result.response) for name, result in failed.items()}
    for result in failed.values():
        assert any("400" in error for error in result.errors), result.errors
        assert "content[1]" in result.response["error"]["param"] or "content" in result.response["error"]["param"]
    passed = [result for result in results if result.status.name == "PASSED"]
    assert len(passed) >= 7
    warnings = [(result.id, warning) for result in passed for warning in result.warnings if "compact" not in result.id]
    assert warnings == []
