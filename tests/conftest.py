"""What all tests share: figures are drawn off screen, random examples repeat, and a browser on JupyterLab."""

import hypothesis
import matplotlib
import pytest
import torch

matplotlib.use("Agg")
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="module")
def one_thread():
    """Torch on one thread while a file is tested: sums are the same everywhere, times depend less on others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab on copies of notebooks/ and figures/, so that no test can change the checkout."""
    from labserver import copy_course, jupyterlab

    scratch = tmp_path_factory.mktemp("lab")
    with jupyterlab(copy_course(scratch / "course"), scratch) as server:
        yield server


@pytest.fixture(scope="module")
def chromium():
    """One headless browser per test file, closed before the next file starts: it keeps an event loop running."""
    from labserver import CHROMIUM_FLAGS, find_chromium
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def open_notebook(chromium, lab):
    """A function (name) that opens a notebook of the course on a page of its own and returns the NotebookPage."""
    from labserver import NotebookPage

    pages = []

    def open_one(name):
        pages.append(NotebookPage(chromium, lab))
        return pages[-1].open(f"notebooks/{name}")

    yield open_one
    for page in pages:
        page.context.close()
