"""What the HTTP API answers, as schemas: they describe the answers in the OpenAPI document and are never built, for speed."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length"]


class AnswerSchema(BaseModel):
    """A field that is not here is not sent."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(AnswerSchema):
    """What went wrong, as OpenAI says it."""

    message: str
    type: str = Field(description="OpenAI's coarse word.")
    param: str | None = Field(description="The field at fault.")
    code: str = Field(description="A stable word for the kind of error.")


class ErrorAnswer(AnswerSchema):
    """Of every status from 400 on."""

    error: ErrorDetail


class ModelEntry(AnswerSchema):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = Field(description="Tokens of prompt and answer together.")


class ModelList(AnswerSchema):
    """All of them."""

    object: Literal["list"]
    data: list[ModelEntry]


class ReasoningTokens(AnswerSchema):
    """A part of the completion tokens."""

    reasoning_tokens: int


class Usage(AnswerSchema):
    """Tokens counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: ReasoningTokens | None = None


class PromptLogprob(AnswerSchema):
    """Of a token at a position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionLogprobs(AnswerSchema):
    """Columns, an entry for each token; null at the prompt's first token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(AnswerSchema):
    """An answer, or in a stream what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: PromptLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(AnswerSchema):
    """Of /v1/completions, and each chunk of its streams."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprobEntry(AnswerSchema):
    """Of a token."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprobEntry):
    """Of a token of the answer, with the likeliest in its place."""

    top_logprobs: list[TokenLogprobEntry]


class ChatLogprobs(AnswerSchema):
    """Of all tokens of the answer, reasoning and calls included."""

    content: list[ChosenLogprob]
    refusal: None


class CalledFunction(AnswerSchema):
    """Arguments are JSON text, as the model wrote it."""

    name: str
    arguments: str


class CallMade(AnswerSchema):
    """A function that the model calls."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatAnswerMessage(AnswerSchema):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[CallMade] | None = None
    refusal: None
    annotations: list[Any]


class _ChatChoice(AnswerSchema):
    index: int
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    prompt_logprobs: PromptLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class ChatChoice(_ChatChoice):
    """One answer."""

    message: ChatAnswerMessage


class ChatCompletion(AnswerSchema):
    """Of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(AnswerSchema):
    """The name comes once, with the first piece of the arguments."""

    name: str | None = None
    arguments: str


class CallDelta(AnswerSchema):
    """More of call `index`."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(AnswerSchema):
    """What is new in a turn."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(_ChatChoice):
    """What is new in one answer."""

    delta: ChatDelta


class ChatCompletionChunk(AnswerSchema):
    """An event of a chat's stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ResponseUsage(AnswerSchema):
    """Tokens counted."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class OutputPart(AnswerSchema):
    """A piece of a message's text, or of reasoning."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[ChosenLogprob] | None = None


class OutputItem(AnswerSchema):
    """A message, reasoning, or a call of a function."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] | None = None
    content: list[OutputPart] | None = None
    summary: list[Any] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class ResponseAnswer(AnswerSchema):
    """Of /v1/responses, and in its stream the whole as it stands. The request's own settings are sent back."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    error: None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None


class ResponseEvent(AnswerSchema):
    """An event of a response's stream; the rest of its fields go by its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


class TokenizeAnswer(AnswerSchema):
    """Of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(AnswerSchema):
    """Of /detokenize."""

    prompt: str


class StatusAnswer(AnswerSchema):
    """Of a probe."""

    status: str
