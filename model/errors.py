"""Errors of the model package.

ModelError
├── UnsupportedModel    a config asks for arithmetic that we do not do exactly
├── CheckpointError     a file or tensor is missing, truncated or misshapen
├── ExpertNotHeld       a batch names experts that this process does not hold
└── TokenizerError      the tokenizer or its chat template cannot do what is asked
"""

from collections.abc import Sequence


class ModelError(Exception):
    """Base of the tree. `kind` is stable: metrics, HTTP and gRPC show it."""

    kind = "model_error"


class UnsupportedModel(ModelError):
    """Names the config key, its value and what is supported."""

    kind = "unsupported_model"


class CheckpointError(ModelError):
    """Names the file, the tensor, what was expected and what was found."""

    kind = "bad_checkpoint"


class ExpertNotHeld(ModelError):
    """`experts` are the (layer, expert) pairs that were asked for and are not here; nothing was computed."""

    kind = "expert_not_held"

    def __init__(self, experts: Sequence[tuple[int, int]]) -> None:
        self.experts = tuple(experts)
        names = ", ".join(f"layer {layer} expert {expert}" for layer, expert in self.experts)
        super().__init__(f"not held here: {names}; ask a host that the placement map names, or load them first")

    def __reduce__(self) -> tuple[type["ExpertNotHeld"], tuple[tuple[tuple[int, int], ...]]]:
        # An exception is pickled by its message alone otherwise, and this one crosses processes.
        return type(self), (self.experts,)


class TokenizerError(ModelError):
    """Names what is missing (chat template) or which input cannot be encoded."""

    kind = "bad_tokenizer"


class ChatTemplateMissing(TokenizerError):
    """The checkpoint has no chat template: only completions can be served."""

    kind = "no_chat_template"
