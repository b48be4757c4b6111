"""Errors of the model package.

ModelError
├── UnsupportedModel    a config asks for arithmetic that we do not do exactly
├── CheckpointError     a file or tensor is missing, truncated or misshapen
└── TokenizerError      the tokenizer or its chat template cannot do what is asked
"""


class ModelError(Exception):
    """Base of the tree. `kind` is stable: metrics, HTTP and gRPC show it."""

    kind = "model_error"


class UnsupportedModel(ModelError):
    """Names the config key, its value and what is supported."""

    kind = "unsupported_model"


class CheckpointError(ModelError):
    """Names the file, the tensor, what was expected and what was found."""

    kind = "bad_checkpoint"


class TokenizerError(ModelError):
    """Names what is missing (chat template) or which input cannot be encoded."""

    kind = "bad_tokenizer"


class ChatTemplateMissing(TokenizerError):
    """The checkpoint has no chat template: only completions can be served."""

    kind = "no_chat_template"
