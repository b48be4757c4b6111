import pytest
import torch
from hypothesis import settings

# How long an example takes on a busy machine is no property of the code.
settings.register_profile("transport", deadline=None)
settings.load_profile("transport")


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
