"""README's table of parameters is the schemas' own; nothing that OpenAI's client can send is left out of it."""

import inspect
from pathlib import Path

import pytest
from openai.resources.chat.completions import Completions as Chat
from openai.resources.completions import Completions
from openai.resources.responses import Responses

from cluster.api.parameters import BEGIN, END, ENDPOINTS, is_refused, parameter_table

README = Path(__file__).parents[2] / "README.md"
CLIENT_ONLY = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


def test_the_readme_has_the_table_as_it_is():
    text = README.read_text()
    if BEGIN not in text:
        pytest.skip("README.md has no table of parameters yet")
    assert BEGIN + text.partition(BEGIN)[2].partition(END)[0] + END == parameter_table(), "python -m cluster.api.parameters prints it"


@pytest.mark.parametrize(
    ("endpoint", "create"), [("completions", Completions.create), ("chat", Chat.create), ("responses", Responses.create)]
)
def test_every_parameter_of_openais_client_has_a_line(endpoint, create):
    theirs = set(inspect.signature(create).parameters) - CLIENT_ONLY
    assert theirs - set(ENDPOINTS[endpoint].model_fields) == set()


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_parameter_says_what_it_does(endpoint):
    for name, field in ENDPOINTS[endpoint].model_fields.items():
        assert is_refused(field) or (field.description or "").strip(), name
