"""The demo checkpoints, built once into the repository's ignored build/ folder and shared by every test that wants real weights."""

from pathlib import Path

import pytest

from cluster.demo_model import DemoModelError, DemoPaths, write_demo_model

BUILD_DIRECTORY = Path(__file__).resolve().parents[1] / "build" / "demo"


def demo_paths() -> DemoPaths:
    """Both checkpoints; the first call of all takes half a minute. Skips where the packages they are made from are absent."""
    try:
        return write_demo_model(BUILD_DIRECTORY, lambda done, what: None)
    except DemoModelError as error:
        if "pip install" in str(error):
            pytest.skip(str(error))
        raise
