"""Text to token ids and back over HTTP, in vLLM's form."""

from fastapi import FastAPI
from pydantic import Field
from starlette.responses import Response

from cluster.api.answers import DetokenizeAnswer, TokenizeAnswer
from cluster.api.chat import ChatMessage, messages_of, template_variables
from cluster.api.connection import json_response
from cluster.api.openapi import answers
from cluster.api.rendering import token_text
from cluster.api.schema import Schema
from cluster.api.service import Call, TextService
from cluster.api.tools import Tool, check_tools, offered
from router.errors import InvalidRequest


class TokenizeRequest(Schema):
    """POST /tokenize: a prompt, or a conversation as its chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = Field(None, max_length=128, description="With messages.")
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = Field(None, description="With messages.")
    add_special_tokens: bool = Field(True, description="With prompt; a chat template writes its own.")
    return_token_strs: bool | None = None


class DetokenizeRequest(Schema):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def add_tokenize(app: FastAPI, service: TextService) -> None:
    """POST /tokenize and /detokenize."""

    @app.post("/tokenize", tags=["tokens"], **answers(TokenizeAnswer))
    async def tokenize(body: TokenizeRequest) -> Response:
        """The token ids that a completions or a chat request would have as its prompt."""
        service.check_model(body.model)
        tokens = await _tokens(service, body)
        answer = {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens}
        if body.return_token_strs:
            answer["token_strs"] = [token_text(service.tokenizer, token) for token in tokens]
        return json_response(answer)

    @app.post("/detokenize", tags=["tokens"], **answers(DetokenizeAnswer))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens included."""
        service.check_model(body.model)
        service.check_token_ids(body.tokens, "tokens")
        return json_response({"prompt": service.decode(body.tokens, skip_special_tokens=False)})


async def _tokens(service: TextService, body: TokenizeRequest) -> tuple[int, ...]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("prompt: give either prompt or messages.", field="prompt")
    if body.messages is None:
        for name in ("tools", "chat_template_kwargs"):
            if getattr(body, name) is not None:
                raise InvalidRequest(f"{name}: needs messages.", field=name)
        return await service.encode(body.prompt or "", body.add_special_tokens)
    check_tools(body.tools, None)
    call = Call(
        "",
        messages=messages_of(body.messages),
        tools=offered(body.tools, None),
        template_variables=template_variables(body.chat_template_kwargs),
    )
    return await service.encode_chat(call)
