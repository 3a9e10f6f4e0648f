import matplotlib
import matplotlib.pyplot as plt
import pytest

from deepseek_lab.plots import use_style


@pytest.fixture(autouse=True)
def course_style():
    """Figures look as in a notebook, and no figure or setting of one test is there in the next."""
    with matplotlib.rc_context():
        use_style()
        yield
    plt.close("all")
