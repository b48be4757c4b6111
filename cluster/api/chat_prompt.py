"""The prompt of a conversation: a checkpoint's chat template, with tools in words where the template has no place for them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.api.chat_parts import END_THINK, THINK
from cluster.api.tool_calls import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR, TAG_BEGIN, TAG_END
from model.tokenizer import Tokenizer

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatPrompt:
    """`opens_thinking`: its last word is <think>, so that the answer begins with reasoning."""

    token_ids: tuple[int, ...]
    opens_thinking: bool


def chat_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Message], variables: Mapping[str, Any], *, is_constrained: bool
) -> ChatPrompt:
    """An answer that is held to a form cannot think first: a <think> that the template opens is then closed at once.

    Raises ChatTemplateMissing, or TokenizerError with the template's own words.
    """
    if tools and not tokenizer.template_takes_tools:
        messages, tools = with_tools_in_words(messages, tools, uses_deepseek_tokens=CALLS_BEGIN in tokenizer.chat_template), ()
    text = tokenizer.chat_text(messages, tools, variables)
    opens_thinking = text.rstrip().endswith(THINK)
    if opens_thinking and is_constrained:
        text = f"{text.rstrip()}\n\n{END_THINK}\n\n"
        opens_thinking = False
    # The template writes its own begin token: adding special tokens again would double it.
    return ChatPrompt(tokenizer.encode(text, add_special_tokens=False), opens_thinking)


def with_tools_in_words(messages: Sequence[Message], tools: Sequence[Message], *, uses_deepseek_tokens: bool) -> list[Message]:
    """The conversation with the functions described in its system message, which is made if there is none."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    if uses_deepseek_tokens:
        call = f"{CALL_BEGIN}function{SEPARATOR}NAME\n```json\nARGUMENTS\n```{CALL_END}"
        form = f"{CALLS_BEGIN}{call}{CALLS_END}"
    else:
        form = f'{TAG_BEGIN}{{"name": NAME, "arguments": ARGUMENTS}}{TAG_END}'
    words = (
        f"You can call these functions, described in JSON one to a line:\n{listed}\n"
        f"To call one, answer with its name and its arguments, an object in JSON, in this form:\n{form}"
    )
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{words}"}, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]
