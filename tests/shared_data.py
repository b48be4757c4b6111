"""Real traces and prompts that lie beside the project where there are any; the product never needs them."""

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """The file or folder of that name; skips, with the reason, where it is absent. In CI its absence is a failure."""
    path = SHARED / name
    if not path.exists():
        if os.environ.get("CI"):
            pytest.fail(f"CI has the shared data beside the project, but there is no {name} in it")
        pytest.skip(f"the shared data ({name}) is not beside the project")
    return path
