"""What holds an answer to a form: response_format and the guided_ fields, each as the one constraint that a router knows."""

import json
from typing import Any, Literal

from pydantic import Field

from cluster.api.schema import Schema
from router.errors import InvalidRequest
from router.request import Constraint

ONE_OF = ("response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar")


class JsonSchemaFormat(Schema):
    """A schema with a name of its own."""

    name: str = Field(description="Ignored: it is the client's own word.")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="The JSON schema; none: any object.")
    description: str | None = Field(None, description="Ignored: say it in the messages.")
    strict: bool | None = Field(None, description="Ignored: an answer is always held to the schema.")


class ResponseFormat(Schema):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = Field(None, description="Only with the type json_schema.")


class GuidedFields(Schema):
    """At most one of them in one request."""

    response_format: ResponseFormat | None = Field(None, description="Holds the answer to JSON: any object, or a schema's.")
    guided_json: dict[str, Any] | str | None = Field(None, description="Holds the answer to a JSON schema.")
    guided_regex: str | None = Field(None, description="Holds the answer to a regular expression.")
    guided_choice: list[str] | None = Field(None, description="Makes the answer one of these strings.")
    guided_grammar: str | None = Field(None, description="Holds the answer to a context-free grammar in Lark's syntax.")


def constraint_of(body: GuidedFields) -> tuple[str, Constraint] | None:
    """The client's word for the constraint, and the constraint; InvalidRequest where there are two."""
    found = [(name, constraint) for name in ONE_OF if (constraint := _constraint(body, name)) is not None]
    if len(found) > 1:
        raise InvalidRequest(f"{found[1][0]}: the answer is held to {found[0][0]} already; give one of them.", field=found[1][0])
    return found[0] if found else None


def json_schema_constraint(schema: dict[str, Any] | None) -> Constraint:
    """Any object, where there is no schema."""
    return Constraint(kind="json_object") if schema is None else Constraint(kind="json_schema", value=json.dumps(schema))


def _constraint(body: GuidedFields, name: str) -> Constraint | None:
    value = getattr(body, name)
    if value is None:
        return None
    if name == "response_format":
        return _of_response_format(value)
    if name == "guided_json":
        return Constraint(kind="json_schema", value=value if isinstance(value, str) else json.dumps(value))
    if name == "guided_choice":
        return Constraint(kind="choice", value=json.dumps(value))
    return Constraint(kind="regex" if name == "guided_regex" else "grammar", value=value)


def _of_response_format(wanted: ResponseFormat) -> Constraint | None:
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise InvalidRequest("response_format.json_schema: is missing.", field="response_format.json_schema")
        return json_schema_constraint(wanted.json_schema.schema_)
    if wanted.json_schema is not None:
        raise InvalidRequest("response_format.json_schema: needs the type json_schema.", field="response_format.json_schema")
    return Constraint(kind="json_object") if wanted.type == "json_object" else None
