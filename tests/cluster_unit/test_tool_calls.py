import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api.chat_parts import ContentReader, ReasoningReader
from cluster.api.tool_calls import CallListReader, NamedCallReader, ToolCallReader
from cluster.api.tools import FunctionDefinition, Tool, forced_calls

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def fenced(name, arguments):
    """DeepSeek-V2, V3 and R1."""
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


def plain(name, arguments):
    """DeepSeek-V3.1."""
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


def tagged(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def read(reader, pieces):
    """(reasoning, content, [(name, arguments)])"""
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.flush()
    assert all(part.text or part.name for part in parts)
    texts = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("reasoning", "content")}
    calls = {}
    for part in parts:
        if part.kind == "call":
            assert (part.name is None) == (part.index in calls), "the first part of a call, and no other, has the name"
            calls.setdefault(part.index, [part.name, ""])[1] += part.text
    assert list(calls) == list(range(len(calls)))
    return texts["reasoning"], texts["content"], [tuple(call) for call in calls.values()]


ONE = '{"city": "São Paulo", "n": {"x": [1, "}"]}}'
TWO = "{}"
TEXTS = [
    ("hello", "hello", []),
    ("", "", []),
    ("  a < b <tool", "  a < b <tool", []),
    (f"{BEGIN}{fenced('f', ONE)}{END}", "", [("f", ONE)]),
    (f"I look.\n\n{BEGIN}{fenced('f', ONE)}\n{fenced('g', TWO)}{END}", "I look.", [("f", ONE), ("g", TWO)]),
    (f"{BEGIN}{plain('f', ONE)}{plain('g', TWO)}{END}", "", [("f", ONE), ("g", TWO)]),
    (fenced("f", ONE), "", [("f", ONE)]),
    (f"{BEGIN}{fenced('f', '{`}`: 1}')}", "", [("f", "{`}`: 1}")]),
    (f"so {tagged('f', ONE)}\n{tagged('g', TWO)} done", "sodone", [("f", ONE), ("g", TWO)]),
    ("<tool_call>no json</tool_call>", "<tool_call>no json", []),
    (f'{BEGIN}<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{{"a": 1', "", [("f", '{"a": 1')]),
    (f'{BEGIN}<｜tool▁call▁begin｜>f<｜tool▁sep｜>{{"a": 1<｜tool▁call', "", [("f", '{"a": 1')]),
    (f"{BEGIN}<｜tool▁call▁begin｜>func", "<｜tool▁call▁begin｜>func", []),
]


@pytest.mark.parametrize(("text", "content", "calls"), TEXTS)
def test_calls_however_the_text_is_cut(text, content, calls):
    cut_ways = [[text], list(text), [text[i : i + 3] for i in range(0, len(text), 3)]]
    for pieces in cut_ways:
        _, found, made = read(ToolCallReader(), pieces)
        assert found == content
        assert [(name, json.loads(arguments) if arguments == ONE else arguments) for name, arguments in made] == [
            (name, json.loads(arguments) if arguments == ONE else arguments) for name, arguments in calls
        ]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_where_a_text_is_cut_makes_no_difference(data):
    pieces_of = [
        BEGIN,
        END,
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "function",
        "f",
        "\n```json\n",
        "\n```",
        "{}",
    ]
    pieces_of += ["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}', " ", "\n", "<", "x", "｜"]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces_of), max_size=12)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    opened = data.draw(st.booleans())
    whole = read(ReasoningReader(ToolCallReader(), opened=opened), [text])
    assert read(ReasoningReader(ToolCallReader(), opened=opened), pieces) == whole


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nwell\n\nso\n</think>\n\nyes", False, "well\n\nso", "yes"),
        ("well</think>yes", True, "well", "yes"),
        ("<think>\nwell</think>yes", True, "well", "yes"),
        ("<think>cut", False, "cut", ""),
        ("cut </thi", True, "cut </thi", ""),
        ("no <think>thought</think>", False, "", "no <think>thought</think>"),
        ("<think></think>yes", False, "", "yes"),
        ("  yes", False, "", "  yes"),
        ("<th", False, "", "<th"),
    ],
)
def test_reasoning_stands_apart(text, opened, reasoning, content):
    for pieces in ([text], list(text)):
        reader = ReasoningReader(ContentReader(), opened=opened)
        assert read(reader, pieces)[:2] == (reasoning, content)
        if "</think>" in text and reader.thinks:
            assert text[: reader.end].endswith("</think>")


def test_a_forced_call_is_read_as_it_was_constrained():
    for pieces in ([ONE], list(ONE)):
        assert read(NamedCallReader("f"), pieces)[2] == [("f", ONE)]
    text = f'[{{"name": "f", "parameters": {ONE}}}, {{"name":"g","parameters":{{}}}}]'
    for pieces in ([text], list(text)):
        assert read(CallListReader(), pieces) == ("", "", [("f", ONE), ("g", "{}")])
    assert read(CallListReader(), ['[{"name": "f", "parameters": {"a": [1'])[2] == [("f", '{"a": [1')]
    assert read(CallListReader(), ['[{"name": "f", "param'])[2] == []


def tool(name, parameters):
    return Tool(type="function", function=FunctionDefinition(name=name, parameters=parameters))


def test_definitions_of_several_functions_do_not_meet():
    import jsonschema

    shared = {"properties": {"x": {"$ref": "#/$defs/X"}}, "required": ["x"]}
    tools = [tool("f", {**shared, "$defs": {"X": {"type": "integer"}}}), tool("g", {**shared, "$defs": {"X": {"type": "string"}}})]
    schema = json.loads(forced_calls(tools, "required", True).value)
    jsonschema.validate([{"name": "f", "parameters": {"x": 1}}, {"name": "g", "parameters": {"x": "1"}}], schema)
    for wrong in ([], [{"name": "f", "parameters": {"x": "1"}}], [{"name": "h", "parameters": {}}], [{"name": "g", "parameters": {}}]):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    one = json.loads(forced_calls(tools, "required", False).value)
    assert one["maxItems"] == 1
