"""The course in a real JupyterLab and browser: it runs, widgets follow the keyboard, nothing leaves the machine."""

import json
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest
from labserver import ROOT, answers, find_chromium, free_port, own_places, running

START = "00_start_here.ipynb"
PICTURE = ".memory-bar svg[role=img]"
# Notebook 12 trains for a minute before its widget stands; this one has records that cost nothing.
REPLAY = """
import torch
import deepseek_lab as lab
loads = torch.randint(1, 90, (40, 3, 16), generator=torch.Generator().manual_seed(0))
records = [lab.training.StepRecord(i, 4 / (i + 1) + 1, 1e-3, 1.0, 64, 0.1, load, {}) for i, load in enumerate(loads)]
samples = {0: "e e ee", 20: "the the that", 39: "The statement is used to wrap a block."}
lab.widgets.training_replay(records, samples, {0: 5.6, 20: 1.4}, step=0)
"""
# The explorers alone, before all that their notebooks compute.
EXPLORERS = """
import deepseek_lab as lab
from IPython.display import display
display(lab.widgets.outlier_explorer())
lab.widgets.bit_explorer("E4M3", 0.1)
"""
# Three pictures of caches: two count only, the third shows a pool of blocks after each operation on it. And the balance
# theatre of notebook 10, on loads at random: there it stands on a minute of training. And a sentence as if it had been
# written with drafts that are wrong where a word begins.
CACHES = """
import torch
import deepseek_lab as lab
from IPython.display import display
from deepseek_lab.attention import BlockPool, PagedCache, pool_step
config = lab.PRESETS["tiny"]
pool = BlockPool(config, 16, block_size=16)
cache, steps = PagedCache(pool), [pool_step(pool, "an empty pool")]
cache.append(torch.ones(1, 100, config.latent_width))
steps.append(pool_step(pool, "append 100 tokens to sequence 0"))
fork = cache.fork(0, 0)
steps.append(pool_step(pool, "fork it twice"))
fork.append(torch.ones(2, 9, config.latent_width))
steps.append(pool_step(pool, "append 9 tokens to both forks"))
display(lab.widgets.cache_race(), lab.widgets.absorption_explorer())
loads, biases = torch.randint(0, 90, (2, 50, 2, 32)), torch.randn(2, 50, 2, 32)
runs = {f"speed {u}": lab.experts.balance.LoadHistory(*run) for u, *run in zip((0.001, 0.01), loads, biases)}
display(lab.widgets.balance_theatre(runs, step=0))
text = list(b"A draft is refused where a word begins, and accepted inside it.")
passes, place = [], 3
while place < len(text) - 1:
    right = text[place - 1] != 32
    passes.append(lab.generation.SpeculationStep(place, (text[place] if right else 101,),
                                                 tuple(text[place : place + 1 + right]), (float(right),)))
    place += 1 + right
record = lab.generation.Speculation(torch.tensor([text[:place]]), len(passes), place - 3 - len(passes), tuple(passes))
display(lab.widgets.speculation_viewer(record, chr))
lab.widgets.paged_cache(steps)
"""
# The way of a text's tokens to the nodes of their experts.
TRAFFIC = """
import deepseek_lab as lab
text = "def to_bytes(value): return bytes(value)"
model = lab.checkpoints.load("tiny")
trace = lab.experts.trace_routing(model, lab.data.ByteTokenizer().encode(text)[None])
lab.widgets.traffic_map(lab.experts.trace_traffic(trace, model.config), text)
"""
# The experts of a text that is typed.
ROUTER = """
import deepseek_lab as lab
model, tokenizer = lab.checkpoints.load("tiny"), lab.data.ByteTokenizer()
def read(text):
    return lab.experts.trace_routing(model, tokenizer.encode(text)[None], shares=True), tokenizer.pieces(text)
lab.widgets.token_router(read, "The with statement", layer=1, token=4)
"""
# The tensors of a model, block by block.
MAP = """
import deepseek_lab as lab
lab.widgets.model_map(model="DeepSeek-V3", block="attention")
"""
# The memory of a step of a small model, recorded both ways.
MEMORY = """
import torch
import deepseek_lab as lab
config = lab.PRESETS["tiny"].replace(num_hidden_layers=2, hidden_size=64)
batches = lab.data.Batches(torch.randint(0, 260, (2_000,)), batch=2, length=64)
timelines = {}
for precision in ("FP32", "FP8"):
    for recompute in (False, True):
        model = lab.model.Transformer(config)
        if precision == "FP8":
            lab.model.apply_policy(model, lab.precision.PrecisionPolicy())
        model.recompute = {"norms", "up-projections", "swiglu"} if recompute else ()
        run = lab.training.train(model, batches, lab.training.Recipe(steps=9))
        next(run)
        timelines[precision, recompute] = lab.accounting.record_step(model, lambda: next(run))
lab.widgets.memory_timeline(timelines)
"""


def lab_command(*variables: str) -> list[str]:
    """The command that `make lab` ends with, run by this interpreter instead of .venv's."""
    if shutil.which("make") is None:
        pytest.skip("make is not on this machine; README.md has the plain commands")
    lines = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "lab", f"PY={sys.executable}", *variables],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return lines[-1].split()


def printed_token(log, link: str, seconds: float = 30) -> str:
    """What follows the link in the server's output, once it is printed."""
    deadline = time.monotonic() + seconds
    while link not in log.read_text():
        assert time.monotonic() < deadline, f"{link} is not in what JupyterLab printed:\n{log.read_text()}"
        time.sleep(0.1)
    return log.read_text().partition(link)[2].split()[0]


def test_make_lab_listens_on_loopback_and_asks_for_the_token_it_prints(tmp_path):
    port = free_port()
    command = lab_command(f"LAB_FLAGS=--no-browser --ServerApp.port={port} --ServerApp.port_retries=0")
    assert "--ServerApp.ip=127.0.0.1" in command
    assert not [word for word in command if "token" in word or "password" in word]
    log, url = tmp_path / "lab.log", f"http://127.0.0.1:{port}"
    with running(command, own_places(tmp_path), f"{url}/api", log):
        token = printed_token(log, f"{url}/lab/tree/notebooks/{START}?token=")
        assert len(token) >= 32
        assert answers(f"{url}/api/contents/notebooks") == 403
        assert answers(f"{url}/api/contents/notebooks", token) == 200


@pytest.fixture(scope="module")
def start(open_notebook):
    """The first notebook on one page, run once for all tests of this file."""
    return open_notebook(START).run_all()


@pytest.fixture
def picture(start):
    """The memory bar's picture; its aria-label says in words what it shows. The test that uses it logs no error."""
    start.errors.clear()
    svg = start.page.locator(PICTURE)
    svg.scroll_into_view_if_needed()
    yield svg
    assert start.errors == []


def changed(picture, before: str) -> str:
    """Wait until the picture says something else than before; return what it says."""
    from playwright.sync_api import expect

    expect(picture).not_to_have_attribute("aria-label", before, timeout=10_000)
    return picture.get_attribute("aria-label")


def spoken(handle) -> tuple[str | None, str | None]:
    """What a screen reader says of a slider: its name and its value."""
    return handle.get_attribute("aria-label"), handle.get_attribute("aria-valuetext")


def test_the_first_notebook_runs_in_jupyterlab_without_errors_or_outside_requests(start):
    start.shot("00_start_here")
    assert start.outside == []
    assert start.errors == []


def test_the_memory_bar_follows_its_slider_by_keyboard(start, picture):
    start.slider("context").focus()
    start.press("Home")
    start.page.wait_for_timeout(1000)  # the slider may have stood there already, so nothing need change
    says, height = picture.get_attribute("aria-label"), picture.bounding_box()["height"]
    for key in ("ArrowRight", "End", "ArrowLeft"):
        start.press(key)
        says = changed(picture, says)
    batch = start.slider("batch")
    assert spoken(start.slider("context")) == ("context", "65,536 tokens")
    batch.focus()
    start.press("ArrowRight")
    changed(picture, says)
    assert spoken(batch) == ("batch", "16 sequences")
    assert picture.bounding_box()["height"] == height, "the page jumps when the picture changes"
    start.shot("memory_bar")


@pytest.mark.parametrize("label", ["model", "weights", "cache", "gpu"])
def test_every_choice_of_the_memory_bar_can_be_made_by_keyboard(start, picture, label):
    choice, says = start.dropdown(label), picture.get_attribute("aria-label")
    chosen = choice.input_value()
    choice.focus()
    start.press("ArrowDown" if choice.evaluate("s => s.selectedIndex + 1 < s.options.length") else "ArrowUp")
    assert choice.input_value() != chosen
    says = changed(picture, says)
    choice.select_option(chosen)
    changed(picture, says)


def test_the_controls_of_the_memory_bar_are_reached_by_tab(start, picture):
    start.dropdown("model").focus()
    reached = set()
    for _ in range(12):
        reached.add(
            start.page.evaluate("""() => document.activeElement.closest('.widget-inline-hbox')
            ?.querySelector('.widget-label')?.textContent""")
        )
        start.press("Tab")
    assert {"model", "weights", "cache", "gpu", "context", "batch"} <= reached


def test_the_memory_bar_fits_a_column_of_600_pixels(start, picture):
    start.page.set_viewport_size({"width": 600, "height": 900})
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    start.shot("memory_bar_600px")
    start.page.set_viewport_size({"width": 1280, "height": 900})
    assert box["x"] >= 0 and box["x"] + box["width"] <= 600


@pytest.fixture(scope="module")
def one_cell(lab):
    """Notebooks of one cell each, beside the course: replay, explorers, caches, traffic, memory, map."""
    import nbformat

    url, token = lab
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    headers = {"Authorization": f"token {token}", "Content-Type": "application/json"}
    for name, source in (
        ("replay", REPLAY),
        ("explorers", EXPLORERS),
        ("caches", CACHES),
        ("traffic", TRAFFIC),
        ("router", ROUTER),
        ("memory", MEMORY),
        ("map", MAP),
    ):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip())], metadata=kernel)
        body = json.dumps({"type": "notebook", "content": notebook}).encode()
        request = urllib.request.Request(f"{url}/api/contents/notebooks/{name}.ipynb", body, headers, method="PUT")
        urllib.request.urlopen(request, timeout=10).close()


@pytest.mark.parametrize(
    ("name", "widget", "slider", "choice"),
    [
        ("router.ipynb", "token-router", "token", "layer"),
        ("replay.ipynb", "training-replay", "step", "expert layer"),
        ("explorers.ipynb", "outlier-explorer", "outlier", "place"),
        ("traffic.ipynb", "traffic-map", "token", "layer"),
        ("memory.ipynb", "memory-timeline", "moment", "precision"),
        ("03_fp8_matmul.ipynb", "accumulator", "fraction bits", "promoted"),
    ],
)
def test_the_other_pictures_follow_their_controls_by_keyboard(open_notebook, one_cell, name, widget, slider, choice):
    notebook = open_notebook(name).run_all()
    picture = notebook.page.locator(f".{widget} svg[role=img]")
    picture.scroll_into_view_if_needed()
    says, height = picture.get_attribute("aria-label"), picture.bounding_box()["height"]
    notebook.slider(slider).focus()
    notebook.press("ArrowRight")
    says = changed(picture, says)
    notebook.shot(widget.replace("-", "_"))
    layers = notebook.dropdown(choice)
    layers.focus()
    notebook.press("ArrowDown" if layers.evaluate("s => s.selectedIndex + 1 < s.options.length") else "ArrowUp")
    changed(picture, says)
    assert picture.bounding_box()["height"] == height, "the page jumps when the picture changes"
    assert (notebook.errors, notebook.outside) == ([], [])


@pytest.fixture(scope="module")
def bits(open_notebook, one_cell):
    """The page with the bit explorer, 600 pixels wide."""
    notebook = open_notebook("explorers.ipynb").run_all()
    notebook.page.set_viewport_size({"width": 600, "height": 900})
    notebook.page.locator(".bit-explorer").scroll_into_view_if_needed()
    return notebook


def test_every_control_of_the_bit_explorer_is_reached_by_tab_in_order_and_has_a_name(bits):
    bits.dropdown("format").select_option("E4M3")
    bits.dropdown("format").focus()
    said = []
    for _ in range(10):
        said.append(
            bits.page.evaluate("""() => document.activeElement.getAttribute('aria-label') ??
            document.activeElement.closest('.widget-inline-hbox')?.querySelector('.widget-label')?.textContent""")
        )
        bits.press("Tab")
    fields = ["sign"] + ["exponent"] * 4 + ["mantissa"] * 3
    digits = zip(range(7, -1, -1), fields, "00011101", strict=True)
    assert said == ["format", "number", *(f"bit {n}, {field}, is {bit}" for n, field, bit in digits)]


def test_a_typed_number_sets_the_bits_and_a_pressed_bit_the_number(bits):
    picture, page = bits.page.locator(".bit-explorer svg[role=img]"), bits.page
    typed = bits.labelled(".widget-text", "number").locator("input")
    says, place = picture.get_attribute("aria-label"), picture.bounding_box()
    typed.fill("-18.9")
    says = changed(picture, says)
    assert "−18.9 becomes −18" in says
    page.get_by_role("button", name="bit 7, sign, is 1").focus()
    bits.press("Space")
    bits.shot("bit_explorer_focus")
    says = changed(picture, says)
    page.get_by_role("button", name="bit 7, sign, is 0").wait_for()
    assert typed.input_value() == "18.0"
    page.get_by_role("button", name="bit 0, mantissa, is 1").click()
    says = changed(picture, says)
    assert "E4M3, code 0x58: 16;" in says
    typed.fill("abc")
    page.get_by_text("“abc” is not a number.").wait_for()
    bits.shot("bit_explorer_600px")
    typed.fill("0.1")
    says = changed(picture, says)
    bits.dropdown("format").select_option("FP32")
    changed(picture, says)
    page.get_by_role("button", name="bit 31, sign, is 0").wait_for()
    ends = [button.bounding_box() for button in page.locator(".bit-explorer button.bit:visible").all()]
    bits.shot("bit_explorer_32_bits")
    assert len(ends) == 32 and max(box["x"] + box["width"] for box in ends) <= place["x"] + place["width"] + 8
    assert picture.bounding_box() == place, "the page jumps when the format changes"
    assert (bits.errors, bits.outside) == ([], [])


@pytest.fixture(scope="module")
def caches(open_notebook, one_cell):
    """The page with the pictures of caches, 600 pixels wide."""
    notebook = open_notebook("caches.ipynb").run_all()
    notebook.page.set_viewport_size({"width": 600, "height": 1000})
    yield notebook
    assert (notebook.errors, notebook.outside) == ([], [])


@pytest.mark.parametrize(
    ("widget", "sliders"),
    [
        ("cache-race", ("tokens", "batch")),
        ("absorption-explorer", ("context", "batch", "heads", "latent")),
        ("balance-theatre", ("step", "run")),
        ("paged-cache", ("operation",)),
        ("speculation-viewer", ("pass",)),
    ],
)
def test_the_pictures_of_caches_follow_their_sliders_by_keyboard(caches, widget, sliders):
    box = caches.page.locator(f".{widget}")
    picture = box.locator("svg[role=img]")
    picture.scroll_into_view_if_needed()
    says = picture.get_attribute("aria-label")
    for slider in sliders:
        handle = box.locator(".widget-slider", has_text=slider).locator(".noUi-handle")
        handle.focus()  # which may scroll the page
        place = picture.bounding_box()
        caches.press("ArrowRight")
        says = changed(picture, says)
        assert spoken(handle)[0] == slider
        assert picture.bounding_box() == place, "the page jumps when the picture changes"
    caches.shot(widget.replace("-", "_"))
    assert place["x"] >= 0 and place["x"] + place["width"] <= 600


@pytest.mark.parametrize(
    ("widget", "slider"),
    [
        ("cache-race", "tokens"),
        ("balance-theatre", "step"),
        ("paged-cache", "operation"),
        ("speculation-viewer", "pass"),
    ],
)
def test_a_picture_is_played_and_stopped_by_keyboard(caches, widget, slider):
    box = caches.page.locator(f".{widget}")
    picture, handle = box.locator("svg[role=img]"), box.locator(".noUi-handle").first
    handle.focus()
    caches.press("Home")
    caches.page.wait_for_timeout(1_000)  # the slider may have stood there already
    says = picture.get_attribute("aria-label")
    box.get_by_role("button", name="play").focus()
    caches.press("Space")
    says = changed(picture, changed(picture, says))
    caches.shot(f"{widget.replace('-', '_')}_playing")
    box.get_by_role("button", name="pause").focus()
    caches.press("Space")
    caches.page.wait_for_timeout(1_500)
    says = picture.get_attribute("aria-label")
    caches.page.wait_for_timeout(1_500)
    assert picture.get_attribute("aria-label") == says, "it goes on after the pause"


def test_recomputation_is_switched_on_by_keyboard_and_the_step_is_played(open_notebook, one_cell):
    notebook = open_notebook("memory.ipynb").run_all()
    page = notebook.page
    page.set_viewport_size({"width": 600, "height": 1000})
    box = page.locator(".memory-timeline")
    picture = box.locator("svg[role=img]")
    picture.scroll_into_view_if_needed()
    says, place = picture.get_attribute("aria-label"), picture.bounding_box()
    assert says.startswith("FP32 without recomputation: peak")
    page.get_by_label("recomputation", exact=True).focus()
    notebook.press("Space")
    says = changed(picture, says)
    assert says.startswith("FP32 with recomputation: peak")
    notebook.shot("memory_timeline_600px")
    notebook.slider("moment").focus()
    notebook.press("Home")
    says = changed(picture, says)
    assert spoken(notebook.slider("moment")) == ("moment", "start")
    box.get_by_role("button", name="play").focus()
    notebook.press("Space")
    changed(picture, changed(picture, says))
    assert picture.bounding_box() == place, "the page jumps when the picture changes"
    assert place["x"] >= 0 and place["x"] + place["width"] <= 600
    assert (notebook.errors, notebook.outside) == ([], [])


def test_a_typed_text_is_routed_and_rules_are_switched_off_by_keyboard(open_notebook, one_cell):
    notebook = open_notebook("router.ipynb").run_all()
    page = notebook.page
    page.set_viewport_size({"width": 600, "height": 1000})
    picture = page.locator(".token-router svg[role=img]")
    picture.scroll_into_view_if_needed()
    says, place = picture.get_attribute("aria-label"), picture.bounding_box()
    typed = notebook.labelled(".token-router .widget-text", "text").locator("input")
    typed.focus()
    notebook.press("End", "Shift+Home")
    page.keyboard.type("na\u00efve <b>")
    says = changed(picture, says)
    page.wait_for_function("() => document.querySelector('.token-router svg').textContent.includes('C3')")
    says = picture.get_attribute("aria-label")
    for rule in ("bias", "groups", "shared expert"):
        page.get_by_label(rule, exact=True).focus()
        notebook.press("Space")
        says = changed(picture, says)
    assert "bias off, groups off" in says and "which is lost" in says
    notebook.shot("token_router_600px")
    typed.fill("")
    page.get_by_text("0 characters: type 1 to 120.").wait_for()
    assert picture.get_attribute("aria-label") == says and picture.bounding_box() == place
    assert place["x"] >= 0 and place["x"] + place["width"] <= 600
    assert (notebook.errors, notebook.outside) == ([], [])


def test_a_block_of_the_model_is_chosen_by_click_and_by_keyboard(open_notebook, one_cell):
    notebook = open_notebook("map.ipynb").run_all()
    page = notebook.page
    page.set_viewport_size({"width": 600, "height": 1000})
    picture = page.locator(".model-map svg[role=img]")
    picture.scroll_into_view_if_needed()
    says, place = picture.get_attribute("aria-label"), picture.bounding_box()
    assert says.startswith("attention: 11.4 B of 671.0 B parameters, 1.7 %")
    page.locator(".model-map rect.block[data-name='routed experts']").click()
    says = changed(picture, says)
    assert says.startswith("routed experts: 653.9 B") and "40.9 GFLOP" in says
    blocks = notebook.dropdown("block")
    assert blocks.input_value() == "routed experts"
    notebook.shot("model_map_600px")
    notebook.press("ArrowDown")  # the click has left the focus on the list
    says = changed(picture, says)
    assert says.startswith("final norm: 7.2 K")
    notebook.dropdown("model").select_option("Llama 3.1 8B")
    says = changed(picture, says)
    page.locator(".model-map rect.block[data-name='dense feed-forward']").click()
    changed(picture, says)
    assert [option.strip() for option in blocks.locator("option").all_inner_texts()][2:4] == ["layers", "norms"]
    assert picture.bounding_box() == place, "the page jumps when the picture changes"
    assert place["x"] >= 0 and place["x"] + place["width"] <= 600
    assert (notebook.errors, notebook.outside) == ([], [])


def test_a_missing_browser_is_skipped_for_a_learner_and_fails_in_ci(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium found"):
        find_chromium()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no Chromium found"):
        find_chromium()
