"""The house keeps its shape: imports point one way, importing is cheap, files stay short, nothing is unpickled."""

import ast
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "deepseek_lab"
FILES = sorted(LIBRARY.rglob("*.py"))
TREES = {path: ast.parse(path.read_text("utf-8")) for path in FILES}
NAMES = {path: path.relative_to(ROOT).as_posix() for path in FILES}

# Each room and the rooms it may import from; ARCHITECTURE.md draws the same. A room may always import from itself.
WORDS = {"config", "facts", "units"}  # standard library only: for every room but those that know arrays alone
ARROWS = {
    "config": set(),
    "facts": set(),
    "units": set(),
    "kernels": set(),
    "precision": {"kernels"},
    "attention": WORDS | {"precision", "kernels"},
    "experts": WORDS | {"precision", "kernels"},
    "model": WORDS | {"attention", "experts", "precision"},
    "data": set(),
    "training": WORDS | {"model", "data", "precision", "experts", "accounting"},
    "generation": WORDS | {"model", "attention", "experts", "kernels"},
    "reasoning": WORDS | {"training", "generation", "data"},
    "checkpoints": WORDS | {"model", "training", "data", "experts", "generation", "precision"},
    "accounting": WORDS,
    "plots": WORDS | {"accounting", "precision"},
    "widgets": WORDS | {"plots", "accounting", "precision"},
    "notebook": {"plots"},
    "__init__": set(),
}
ARROWS["exercises"] = set(ARROWS)
ROOMS_OF_SEVERAL_FILES = {
    "config_checks": "config",
    "hf_config": "config",
    "presets": "config",
    "notebook_rules": "notebook",
}
HEAVY = {"torch", "numba", "matplotlib", "transformers", "IPython", "ipywidgets"}
STANDARD_ONLY = ["config.py", "config_checks.py", "hf_config.py", "presets.py", "facts.py", "units.py", "accounting"]
MEASURING = {"measured", "recorder"}  # of accounting
UNSAFE = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}


def room(path: Path) -> str:
    """The first name under deepseek_lab/, of a file or a folder: config, kernels, model ..."""
    name = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
    return ROOMS_OF_SEVERAL_FILES.get(name, name)


def imports(path: Path):
    """Yield every imported module of a file as its dotted name, those inside functions too."""
    package = ["deepseek_lab", *path.relative_to(LIBRARY).parts[:-1]]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    inside = [name.split(".") for name in imports(path) if name.split(".")[0] == "deepseek_lab"]
    names = {parts[1] if len(parts) > 1 else "deepseek_lab as a whole" for parts in inside}
    return {ROOMS_OF_SEVERAL_FILES.get(name, name) for name in names}


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_imports_point_one_way(path):
    here = room(path)
    assert here in ARROWS, f"deepseek_lab/{here} is a new room: give it its arrows here and in ARCHITECTURE.md"
    upward = rooms_imported(path) - ARROWS[here] - {here}
    assert not upward, f"{NAMES[path]} imports from {sorted(upward)}; {here} may import from {sorted(ARROWS[here])}"


def test_the_arrows_have_no_circle():
    order, left = [], dict(ARROWS)
    while ready := [name for name, below in left.items() if below - {name} <= set(order)]:
        order += ready
        left = {name: below for name, below in left.items() if name not in ready}
    assert left == {}


def test_what_is_predicted_shares_no_code_with_what_is_measured():
    predictors = {path.stem for path in (LIBRARY / "accounting").glob("*.py")} - {"__init__", "ledger"} - MEASURING
    for path in (LIBRARY / "accounting").glob("*.py"):
        names = {part for name in imports(path) if "accounting" in name for part in name.split(".")}
        if path.stem in MEASURING:
            assert not names & predictors
        else:
            assert not names & MEASURING, NAMES[path]


@pytest.mark.parametrize("place", STANDARD_ONLY)
def test_words_and_accounting_need_the_standard_library_only(place):
    target = LIBRARY / place
    for path in [target] if target.is_file() else sorted(target.glob("*.py")):
        tops = {name.split(".")[0] for name in imports(path)} - {"deepseek_lab", "lazy_loader"}
        if path.stem in MEASURING:  # they count the bytes of live torch objects
            tops -= {"torch"}
        assert tops <= set(sys.stdlib_module_names), NAMES[path]


@pytest.mark.parametrize("statement", ["import deepseek_lab", "import deepseek_lab as d; d.PRESETS; d.accounting"])
def test_importing_is_cheap(statement):
    script = f"import sys; {statement}; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not HEAVY & set(loaded.split())


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_a_file_and_its_functions_are_short(path):
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= 250, "look for the second idea in it"
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 45, f"{node.name} does more than one thing"


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_nothing_is_unpickled_or_evaluated(path):
    assert not UNSAFE & {name.split(".")[0] for name in imports(path)}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load", "np.load", "numpy.load"), (
                f"line {node.lineno}: {called}"
            )


# Lines of code: a docstring, a comment or an empty line makes a file longer and its reading shorter. What computes, and
# what shows and asks: pictures, their controls and the answers to exercises grow with the notebooks.
# It was 7,000 and 4,000 until training in full came (the recipe, prediction modules, speculation, what is computed
# again, memory through a step) with two maps to look at: some 1,000 and 1,100 lines. Who moves it says for what.
AT_MOST = {"the library": 7500, "its pictures and exercises": 5000}
SPACE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(path: Path) -> int:
    with tokenize.open(path) as file:
        tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type not in SPACE]
    taken = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            taken -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(taken)


@pytest.mark.parametrize("what", AT_MOST)
def test_the_library_is_an_afternoons_reading(what):
    shown = {path for path in FILES if room(path) in ("plots", "widgets", "exercises", "notebook")}
    paths = shown if what != "the library" else set(FILES) - shown
    assert sum(map(lines_of_code, paths)) <= AT_MOST[what]


def test_no_file_names_the_machine_it_was_written_on():
    tracked = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of what is tracked")
    banned = ["/wo" + "rk/", "download." + "pytorch", "../" + "shared", "pypi." + "org", "files.python" + "hosted"]
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        text = path.read_bytes().decode("utf-8", "ignore") if path.is_file() else ""
        assert not [words for words in banned if words in text], name
