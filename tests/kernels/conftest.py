"""Which CUDA kernels ran where is printed at the end of every run that has tests of them: it is never assumed."""

import pytest

RAN = pytest.StashKey[dict]()


@pytest.fixture
def ran(request):
    """What to tell about where kernels ran: a line of text by its title."""
    return request.config.stash.setdefault(RAN, {})


def pytest_terminal_summary(terminalreporter, config):
    for title, line in config.stash.get(RAN, {}).items():
        terminalreporter.write_line(f"CUDA kernels, {title}: {line}")
