"""deepseek_lab.notebook: set-up, the canonical form, and that each kind of mistake in a notebook is found."""

import os
import random

import nbformat
import numpy
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from deepseek_lab.notebook import execute, main, setup
from deepseek_lab.notebook_rules import CHECKED, IGNORED, WIDGET, normalise, problems

SETUP = "import deepseek_lab as lab\nlab.setup()"
COMPARED = {"tags": [CHECKED]}


def code(source, *outputs, tags=(CHECKED,)):
    return new_code_cell(source, execution_count=1, outputs=list(outputs), metadata={"tags": list(tags)})


def stored(folder, *cells, first=None, title="# A title"):
    """Write a notebook that is right but for the given cells; return its path."""
    path = folder / "page.ipynb"
    cells = [new_markdown_cell(title), first or code(SETUP), *cells]
    nbformat.write(normalise(new_notebook(cells=cells), "page"), path)
    return path


def shown(text, **more):
    return new_output("execute_result", {"text/plain": text} | more, execution_count=1)


def test_setup_repeats_every_source_of_chance():
    def draw():
        return random.random(), numpy.random.rand(), torch.rand(()).item()

    assert setup() is None
    first = draw()
    setup()
    assert draw() == first
    setup(seed=1)
    assert draw() != first


def test_setup_sets_the_threads_only_when_asked():
    before = torch.get_num_threads()
    setup()
    assert torch.get_num_threads() == before
    try:
        setup(threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "2..32"),
        ({"threads": 0}, "threads=0"),
        ({"threads": 4 * os.cpu_count() + 1}, r"threads=\d+ is far more .* choose at most \d+, or None"),
    ],
)
def test_setup_refuses_what_cannot_be(wrong, says):
    with pytest.raises(ValueError, match=says):
        setup(**wrong)


@pytest.mark.parametrize("wrong", [{"seed": None}, {"seed": 1.5}, {"seed": "1"}, {"threads": 2.0}])
def test_setup_says_that_it_wants_a_whole_number(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(TypeError, match=f"{name}={value!r} is a .*; choose a whole number, such as {name}=1"):
        setup(**wrong)


def test_setup_takes_the_whole_numbers_of_numpy():
    setup(seed=numpy.int64(3))
    first = random.random()
    setup(seed=3)
    assert random.random() == first


def test_a_right_notebook_has_no_problem(tmp_path):
    assert problems(stored(tmp_path, code("1 + 1", shown("2")), new_markdown_cell("## A section"))) == []


WRONG_CELLS = {
    "exactly one of the tags": [code("1", tags=()), code("1", tags=(CHECKED, IGNORED))],
    "27 lines": [code("\n".join(["1"] * 27))],
    "not executed": [],
    "ends with ';'": [code("plot();")],
    "clear_output": [code("clear_output()")],
    "child process": [code("import os\nos.system('ls')"), code("import subprocess\nsubprocess.run(['ls'])")],
    "installs something": [code("%pip install x"), code("!apt-get install x"), code("!python -m pip install x")],
    "changes the directory": [code("%cd .."), code("import os\nos.chdir('..')")],
    "absolute path": [code("open('/home/me/x')"), code('open("~/x")'), code(r'open("C:\\x")')],
    "stored error": [code("1/0", new_output("error", ename="ZeroDivisionError", evalue="division by zero"))],
    "without an image/png": [code("w", shown("a bar", **{WIDGET: {"model_id": "0"}}))],
    "stderr": [code("warn()", new_output("stream", name="stderr", text="careful"))],
    "differs from machine to machine": [code("object()", shown("<object at 0x7f0012345678>"))],
    "without alternative text": [new_markdown_cell("![](a.png)"), new_markdown_cell('<img src="a.png">')],
    "jumps from level 1 to level 3": [new_markdown_cell("### Too deep")],
    "2 headings of level one": [new_markdown_cell("# Another title")],
}


@pytest.mark.parametrize(("says", "cell"), [(says, cell) for says, cells in WRONG_CELLS.items() for cell in cells])
def test_a_mistake_in_a_cell_is_found_and_nothing_else(tmp_path, says, cell):
    found = problems(stored(tmp_path, cell))
    assert [says in problem for problem in found] == [True], found


def test_a_cell_that_may_differ_may_show_addresses_and_progress(tmp_path):
    bar = new_output("stream", name="stderr", text="100%")
    assert problems(stored(tmp_path, code("run()", bar, shown("<object at 0x7f0012345678>"), tags=(IGNORED,)))) == []


def test_mistakes_of_the_file_are_found(tmp_path):
    assert "lab.setup()" in problems(stored(tmp_path, first=code("import torch")))[0]
    assert "0 headings of level one" in problems(stored(tmp_path, title="no title"))[0]
    assert "1,0" in problems(stored(tmp_path, new_markdown_cell("a" * 1_000_000)))[0]

    path = stored(tmp_path)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].execution_count = None
    nbformat.write(notebook, path)
    assert ["not executed" in found for found in problems(path)] == [True, False]
    assert "canonical form" in problems(path)[1]

    notebook = nbformat.read(stored(tmp_path), as_version=4)
    notebook.metadata["widgets"] = {}
    nbformat.write(notebook, path)
    assert "metadata.widgets" in problems(path)[0]


def test_running_twice_writes_the_same_bytes(tmp_path, capsys):
    widget = "import ipywidgets\nfrom IPython.display import display\ndisplay(ipywidgets.IntSlider(description='x'))"
    path = stored(tmp_path, new_code_cell("print('a')\nprint('b')\n3", metadata=COMPARED), code(widget))
    assert main(["run", str(path)]) == 1, "the plain slider has no picture"
    first = path.read_bytes()
    assert b'"a\\n",\n      "b\\n"' in first.replace(b"       ", b"      ")
    main(["run", str(path)])
    assert path.read_bytes() == first
    assert "image/png" in capsys.readouterr().out


def test_format_changes_no_output_and_check_changes_nothing(tmp_path):
    path = stored(tmp_path, code("1 + 1", shown("2")))
    right = path.read_bytes()
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[2].metadata["collapsed"] = True
    nbformat.write(notebook, path)
    wrong = path.read_bytes()
    assert main(["check", str(path)]) == 1
    assert path.read_bytes() == wrong
    assert main(["format", str(path)]) == 0
    assert path.read_bytes() == right


def test_a_notebook_runs_in_its_own_folder(tmp_path):
    cell = new_code_cell("import pathlib\npathlib.Path('beside.txt').exists()")
    (tmp_path / "beside.txt").touch()
    notebook = execute(new_notebook(cells=[cell]), tmp_path)
    assert notebook.cells[0].outputs[0]["data"]["text/plain"] == "True"


def test_a_full_disk_while_writing_leaves_the_notebook_whole(tmp_path, monkeypatch):
    path = stored(tmp_path, code("1 + 1", shown("2")))
    before = path.read_bytes()

    def half(notebook, target, *_):
        with open(target, "w") as file:
            file.write("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nbformat, "write", half)
    with pytest.raises(OSError, match="No space left"):
        main(["format", str(path)])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["page.ipynb"]


def test_a_formatted_notebook_keeps_its_permissions_and_its_link(tmp_path):
    path = stored(tmp_path, code("1 + 1", shown("2")))
    path.chmod(0o640)
    link = tmp_path / "link.ipynb"
    link.symlink_to(path)
    assert main(["format", str(path)]) == 0
    assert path.stat().st_mode & 0o777 == 0o640
    main(["format", str(link)])
    assert link.is_symlink() and b"link-000" in path.read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_any_file_name_gives_valid_cell_ids(tmp_path):
    path = stored(tmp_path, code("1 + 1", shown("2"))).rename(tmp_path / "mein erstes Übungs.heft v1.2.ipynb")
    assert main(["format", str(path)]) == 0
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].id == "mein-erstes--bungs-heft-v1-2-000"


@pytest.mark.parametrize("action", ["run", "check", "format"])
def test_no_notebook_at_all_is_an_error_that_says_where_to_go(tmp_path, monkeypatch, capsys, action):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([action])
    assert stopped.value.code == 2
    assert "no notebooks/*.ipynb" in (said := capsys.readouterr().err) and "root of the course" in said


def test_a_path_that_is_no_file_is_named_before_anything_is_written(tmp_path, capsys):
    path = stored(tmp_path, code("1 + 1", shown("2")))
    path.write_bytes(path.read_bytes() + b"\n")
    before = path.read_bytes()
    for wrong, says in ((tmp_path / "missing.ipynb", "is not there"), (tmp_path, "is a folder")):
        with pytest.raises(SystemExit) as stopped:
            main(["format", str(path), str(wrong)])
        assert stopped.value.code == 2
        assert f"{wrong} {says}; name the .ipynb files" in capsys.readouterr().err
    assert path.read_bytes() == before
