"""The README's table of parameters, made from the schemas: what each does, or that it is ignored or refused."""

from collections.abc import Mapping

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.api.chat import ChatCompletionRequest
from cluster.api.openai import CompletionRequest
from cluster.api.responses import ResponsesRequest

ENDPOINTS: Mapping[str, type[BaseModel]] = {
    "completions": CompletionRequest,
    "chat": ChatCompletionRequest,
    "responses": ResponsesRequest,
}
BEGIN = "<!-- parameters: made by cluster/api/parameters.py -->"
END = "<!-- end of parameters -->"


def parameter_table() -> str:
    """Markdown between its two marks: one line for each parameter and each way in which endpoints take it."""
    rows: dict[tuple[str, str], list[str]] = {}
    for endpoint, schema in ENDPOINTS.items():
        for name, field in schema.model_fields.items():
            rows.setdefault((name, _meaning(field)), []).append(endpoint)
    lines = [f"| `{name}` | {', '.join(endpoints)} | {meaning} |" for (name, meaning), endpoints in sorted(rows.items())]
    return "\n".join([BEGIN, "| parameter | of | |", "| --- | --- | --- |", *lines, END])


def is_refused(field: FieldInfo) -> bool:
    """Whether no value but null is taken."""
    return field.annotation is type(None)


def is_ignored(field: FieldInfo) -> bool:
    """Whether it is taken without effect."""
    return (field.description or "").startswith("Ignored")


def _meaning(field: FieldInfo) -> str:
    if is_refused(field):
        return "**refused**"
    return (field.description or "").replace("Ignored", "**ignored**").replace("|", "\\|")


if __name__ == "__main__":
    print(parameter_table())
