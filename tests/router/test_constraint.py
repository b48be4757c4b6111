import json

import pytest

from router.constraint import MAX_CHARACTERS, MAX_CHOICES, MAX_DEPTH, check_constraint
from router.errors import InvalidRequest, NoTokenizer
from router.request import Constraint

TOKENIZER = object()  # that there is one is all that is asked


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json_schema", '{"type": "object"}'),
        ("json_schema", "true"),
        ("json_schema", json.dumps({"const": "[" * 999 + '\\"' + "{" * 999})),
        ("json_object", ""),
        ("regex", "a+"),
        ("choice", '["a", "b"]'),
        ("grammar", 'start: "a"'),
    ],
)
def test_what_is_well_formed_passes(kind, value):
    check_constraint(Constraint(kind=kind, value=value), TOKENIZER)


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("json_schema", "{", "not JSON"),
        ("json_schema", "", "not JSON"),
        ("json_schema", "[1]", "object"),
        ("json_schema", '{"a":' * (MAX_DEPTH + 1), "deep"),
        ("json_schema", '{"a": "' + "x" * MAX_CHARACTERS + '"}', "characters"),
        ("json_schema", "[" * 100_000, "deep"),
        ("json_schema", '{"a": 1' + "0" * 5000 + "}", "not JSON"),
        ("json_object", "{}", "no value"),
        ("regex", "", "empty"),
        ("regex", "\ud800", "Unicode"),
        ("grammar", "", "empty"),
        ("choice", "yes", "not JSON"),
        ("choice", "[]", "at least one"),
        ("choice", '["a", 1]', "strings"),
        ("choice", '["a", ""]', "empty"),
        ("choice", json.dumps(["a"] * (MAX_CHOICES + 1)), "at most"),
    ],
)
def test_what_is_not_is_refused_under_the_clients_word(kind, value, says):
    with pytest.raises(InvalidRequest, match=says) as caught:
        check_constraint(Constraint(kind=kind, value=value), TOKENIZER, "guided_json")
    assert (caught.value.kind, caught.value.field) == ("invalid_request", "guided_json")
    assert str(caught.value).startswith("guided_json: ")


def test_without_a_tokenizer_there_are_no_constraints():
    with pytest.raises(NoTokenizer) as caught:
        check_constraint(Constraint(kind="json_object"), None, "response_format")
    assert (caught.value.kind, caught.value.field) == ("no_tokenizer", "response_format")
