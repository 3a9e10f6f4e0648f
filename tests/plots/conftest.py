import matplotlib
import matplotlib.pyplot as plt
import pytest


@pytest.fixture(autouse=True)
def closed_figures():
    """No figure and no setting of one test is there in the next."""
    with matplotlib.rc_context():
        yield
    plt.close("all")
