"""Quick tests first: what needs real Ray runs when everything that needs none has passed."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("cluster") is not None)
