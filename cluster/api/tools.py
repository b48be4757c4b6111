"""Functions that a model may call: what a client says of them, and the form that a forced call is held to."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.api.schema import Schema
from router.errors import InvalidRequest
from router.request import Constraint

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
MAX_TOOLS = 128
MAX_DEPTH = 64  # of a function's parameters; deeper ones are refused before they are walked through
REFERENCES = ("#/$defs/", "#/definitions/")


class FunctionDefinition(Schema):
    """What the model is told of a function."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the type object; none: no arguments.")
    strict: bool | None = Field(None, description="Ignored: a forced call is always held to the schema, a free one never.")


class Tool(Schema):
    """A function; other kinds of tools are not served."""

    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(Schema):
    """By name."""

    name: str


class NamedTool(Schema):
    """The function that must be called."""

    type: Literal["function"]
    function: ChosenFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def check_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None, inside: str = ".function") -> None:
    """InvalidRequest where they contradict each other; `inside` is where in a tool the client wrote its function."""
    if choice not in (None, "none", "auto") and not tools:
        raise InvalidRequest("tool_choice: needs tools.", field="tool_choice")
    names = [tool.function.name for tool in tools or ()]
    for index, name in enumerate(names):
        if name in names[:index]:
            field = f"tools[{index}]{inside}.name"
            raise InvalidRequest(f"{field}: there is a function {name} already.", field=field)
        parameters = (tools or ())[index].function.parameters or {}
        field = f"tools[{index}]{inside}.parameters"
        if parameters.get("type", "object") != "object":
            raise InvalidRequest(f"{field}: must be a schema of the type object.", field=field)
        if _depth(parameters) > MAX_DEPTH:
            raise InvalidRequest(f"{field}: is nested deeper than {MAX_DEPTH}.", field=field)
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise InvalidRequest(f"tool_choice: there is no function {choice.function.name[:64]!r} among the tools.", field="tool_choice")


def offered(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> tuple[dict[str, Any], ...]:
    """What the chat template is given: a chosen function alone, none at all where none may be called."""
    if not tools or choice == "none":
        return ()
    name = choice.function.name if isinstance(choice, NamedTool) else None
    return tuple(
        tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools if name in (None, tool.function.name)
    )


def forced_calls(tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool) -> Constraint | None:
    """What holds the answer to calls: of a chosen function its arguments alone, else a list of {"name", "parameters"}."""
    if isinstance(choice, NamedTool):
        function = next(tool.function for tool in tools or () if tool.function.name == choice.function.name)
        return Constraint(kind="json_schema", value=json.dumps(_arguments(function)))
    if choice != "required":
        return None
    calls, definitions = [], {}
    for tool in tools or ():
        name = tool.function.name
        parameters = _apart(_arguments(tool.function), name)
        for key in ("$defs", "definitions"):
            definitions.update({f"{name}.{part}": schema for part, schema in parameters.pop(key, {}).items()})
        properties = {"name": {"const": name}, "parameters": parameters}
        calls.append({"type": "object", "properties": properties, "required": ["name", "parameters"], "additionalProperties": False})
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return Constraint(kind="json_schema", value=json.dumps(schema))


def _arguments(function: FunctionDefinition) -> dict[str, Any]:
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **function.parameters}


def _apart(schema: Any, name: str) -> Any:
    """The schema with its references into its own definitions renamed, so that those of several functions do not meet."""
    if isinstance(schema, list):
        return [_apart(part, name) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _apart(part, name) for key, part in schema.items()}
    reference = out.get("$ref")
    if isinstance(reference, str):
        for prefix in REFERENCES:
            if reference.startswith(prefix):
                out["$ref"] = f"#/$defs/{name}.{reference.removeprefix(prefix)}"
    return out


def _depth(value: Any) -> int:
    """Levels of nesting, counted no further than one past the limit."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        parts: list[Any] = []
        for part in level:
            parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        level, depth = parts, depth + 1
    return depth
