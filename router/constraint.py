"""What a constraint on an answer must look like before anyone tries to compile it: cheap, for the gateway's event loop."""

import json

from model.tokenizer import Tokenizer
from router.errors import InvalidRequest, NoTokenizer
from router.request import Constraint

MAX_CHARACTERS = 128 * 1024
MAX_DEPTH = 64  # of a JSON value's brackets
MAX_CHOICES = 4096


def check_constraint(constraint: Constraint, tokenizer: Tokenizer | None, field: str = "constraint") -> None:
    """Raises InvalidRequest, or NoTokenizer where the checkpoint has none, naming `field`: the client's word for the constraint.

    What only compiling finds (an expression that is none, a schema that would take too long) the router answers, with an
    InvalidRequest whose field is "constraint".
    """
    if tokenizer is None:
        raise NoTokenizer(f"{field}: the checkpoint has no tokenizer, so its answers cannot be held to a form.", field)
    value = constraint.value
    if len(value) > MAX_CHARACTERS:
        raise InvalidRequest(f"{field}: has {len(value)} characters; at most {MAX_CHARACTERS} are allowed.", field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{field}: is not valid Unicode: character {error.start} is a lone surrogate.", field) from error
    if constraint.kind == "json_schema":
        if not isinstance(_parsed(value, field), dict | bool):
            raise InvalidRequest(f"{field}: a JSON schema is an object, or true or false.", field)
    elif constraint.kind == "choice":
        read_choices(constraint, field)
    elif constraint.kind == "json_object":
        if value:
            raise InvalidRequest(f"{field}: json_object takes no value; for a schema of your own use json_schema.", field)
    elif not value:
        raise InvalidRequest(f"{field}: is empty.", field)


def read_choices(constraint: Constraint, field: str = "constraint") -> tuple[str, ...]:
    """The strings of a choice. InvalidRequest naming `field`."""
    choices = _parsed(constraint.value, field)
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise InvalidRequest(f"{field}: must be a list of strings that are not empty.", field)
    if not 0 < len(choices) <= MAX_CHOICES:
        raise InvalidRequest(f"{field}: has {len(choices)} choices; give at least one and at most {MAX_CHOICES}.", field)
    return tuple(choices)


def _parsed(text: str, field: str) -> object:
    """The JSON value; its depth is bounded before parsing, so that no parser meets a recursion that it does not survive."""
    depth = deepest = 0
    in_string = escaped = False
    for character in text:
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    if deepest > MAX_DEPTH:
        raise InvalidRequest(f"{field}: is nested {deepest} deep; at most {MAX_DEPTH} are allowed.", field)
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"{field}: is not JSON: {error}.", field) from error
