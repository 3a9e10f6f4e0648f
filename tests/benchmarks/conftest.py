"""What the timings share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Torch on one thread while a test runs: what two threads take depends on who else is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
