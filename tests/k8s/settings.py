"""Which names are settings: `placement.min_replicas` is, `placement.least_replicas` is not."""

import re

from cluster.config import Branch, ShoalConfig


def named_settings(text: str) -> list[str]:
    """Everything in a text that looks like one: a branch of the tree, and more."""
    return re.findall(rf"(?<![\w/.-])(?:{'|'.join(ShoalConfig.model_fields)})(?:\.[a-z_]+)+", text)


def is_setting(path: str) -> bool:
    branch: type[Branch] | None = ShoalConfig
    for part in path.split("."):
        if branch is None or part not in branch.model_fields:
            return False
        annotation = branch.model_fields[part].annotation
        kinds = [kind for kind in (annotation, *getattr(annotation, "__args__", ())) if isinstance(kind, type) and issubclass(kind, Branch)]
        branch = kinds[0] if kinds else None
    return True
