"""One object with something else in one place."""

import copy
from typing import Any

REMOVED = object()


def changed(one: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    r"""A copy with `value` at a path such as `spec.groups.0.name`, making mappings on the way; REMOVED takes away what is there.

    A backslash stands for a dot within a key: `metadata.annotations.ray\io/ft-enabled`.
    """
    result = copy.deepcopy(one)
    place: Any = result
    *way, last = (part.replace("\\", ".") for part in path.split("."))
    for part in way:
        if isinstance(place, list):
            place = place[int(part)]
        else:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
    if value is REMOVED:
        del place[int(last) if isinstance(place, list) else last]
    elif isinstance(place, list):
        if last == "-":
            place.append(value)
        else:
            place[int(last)] = value
    else:
        place[last] = value
    return result
