"""How a notebook is stored: its canonical form, and the rules it keeps.

The form is the same bytes on every run, so a diff shows what changed and nothing else. The rules catch what would
make a notebook's test empty or flaky, or a reader stumble. nbval compares what a cell prints with what is stored, so a
cell that was never executed tests nothing, and one whose output holds an address fails elsewhere. Each code cell
therefore says by a tag which of the two it is: `nbval-check-output` (the same on every machine) or
`nbval-ignore-output` (timings, training curves; an assertion in the next cell holds the result).
"""

import re
from pathlib import Path

WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
CHECKED, IGNORED = "nbval-check-output", "nbval-ignore-output"
LONGEST_CELL = 25  # lines: what fits on a slide
LARGEST_FILE = 1_000_000  # bytes

# What a code cell must not say, and why.
FORBIDDEN = {
    r";\s*\Z": "ends with ';', which hides nothing from nbval: end with plt.show(), or assign to _",
    r"clear_output|display_id": "clear_output and display_id are not replayed by nbval: print what should stay",
    r"os\.system\(|subprocess\.(run|call|check_call)\((?![^)]*capture_output)": "lets a child process print: "
    "capture its output and print that",
    r"^\s*[!%].*\b(pip|conda|apt|apt-get) ": "installs something: the environment belongs to pyproject.toml",
    r"^\s*%cd\b|\bos\.chdir\(": "changes the directory: a notebook runs in its own folder",
    r"""["'](/(home|root|Users|tmp|usr|opt|var|mnt|content)/|~/|[A-Za-z]:[\\/])""": "holds an absolute path: "
    "write it relative to the notebook",
}
PRIVATE = r"0x[0-9a-f]{6,}|/tmp/|/home/|/root/|/Users/|ipykernel_\d+"  # differs from machine to machine


def normalise(notebook, stem: str):
    """Give a notebook node its canonical form, in place, and return it. stem: the file's name without .ipynb."""
    from nbformat import from_dict

    notebook.metadata = from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    count = 0
    word = re.sub(r"[^a-zA-Z0-9_-]", "-", stem)[:60]  # an id holds no other characters
    for index, cell in enumerate(notebook.cells):
        cell.id = f"{word}-{index:03d}"
        tags = cell.metadata.get("tags")
        cell.metadata = from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if WIDGET in output.get("data", {}):
                output.data[WIDGET]["model_id"] = f"{index:032x}"  # random in each run, and its state is not stored
    return notebook


def problems(path: str | Path) -> list[str]:
    """Everything about a stored notebook that would make its test empty or flaky, or a reader stumble."""
    import nbformat

    path = Path(path)
    text = path.read_text("utf-8")
    notebook = nbformat.reads(text, as_version=4)
    found = [] if len(text.encode()) <= LARGEST_FILE else [f"{len(text.encode()):,} bytes; keep it to {LARGEST_FILE:,}"]
    if "widgets" in notebook.metadata:
        found.append("metadata.widgets is stored; GitHub then shows nothing in the widget's place")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if code and not re.search(r"\blab\.setup\(", code[0].source):
        found.append("the first code cell does not call lab.setup()")
    for index, cell in enumerate(notebook.cells):
        wrong = _code_problems(cell) + _output_problems(cell) if cell.cell_type == "code" else _picture_problems(cell)
        found += [f"cell {index}: {problem}" for problem in wrong]
    found += _heading_problems([cell.source for cell in notebook.cells if cell.cell_type == "markdown"])
    if nbformat.writes(normalise(notebook, path.stem)) + "\n" != text:
        found.append("not in canonical form; run: python -m deepseek_lab.notebook format")
    return found


def _code_problems(cell) -> list[str]:
    """Source, tags and execution of one code cell."""
    found = [why for pattern, why in FORBIDDEN.items() if re.search(pattern, cell.source, re.M)]
    lines, tags = len(cell.source.splitlines()), cell.metadata.get("tags", [])
    if lines > LONGEST_CELL:
        found.append(f"{lines} lines; split it so that no cell is longer than {LONGEST_CELL}")
    if (CHECKED in tags) == (IGNORED in tags):
        found.append(f"needs exactly one of the tags {CHECKED} and {IGNORED}, has {tags}")
    if cell.execution_count is None:
        found.append("not executed, so nbval would compare nothing; run: python -m deepseek_lab.notebook run")
    return found


def _output_problems(cell) -> list[str]:
    """Stored outputs of one code cell."""
    found, tags = [], cell.metadata.get("tags", [])
    for output in cell.outputs:
        data = output.get("data", {})
        shown = output.get("text", "") + "".join(v for kind, v in data.items() if kind.startswith("text/"))
        if output.output_type == "error" and "raises-exception" not in tags:
            found.append(f"stored error {output.ename}: {output.evalue}")
        if WIDGET in data and "image/png" not in data:
            found.append("a widget without an image/png for readers who have no kernel")
        if IGNORED not in tags and output.get("name") == "stderr":
            found.append("stderr in a compared output")
        if IGNORED not in tags and (private := re.search(PRIVATE, shown)):
            found.append(f"a compared output holds {private[0]!r}, which differs from machine to machine")
    return found


def _picture_problems(cell) -> list[str]:
    """Pictures in one Markdown cell."""
    silent = re.search(r"!\[\s*\]\(", cell.source) or re.search(r"<img(?![^>]*\balt=[\"'][^\"'])", cell.source)
    return ["a picture without alternative text"] if silent else []


def _heading_problems(sources: list[str]) -> list[str]:
    """One title, and no level skipped, over all Markdown cells in order."""
    prose = re.sub(r"^```.*?^```", "", "\n\n".join(sources), flags=re.S | re.M)
    levels = [len(marks) for marks in re.findall(r"^(#{1,6}) ", prose, re.M)]
    jumps = [(a, b) for a, b in zip([0, *levels], levels, strict=False) if b > a + 1]
    found = [f"a heading jumps from level {a} to level {b}" for a, b in jumps]
    return found if levels.count(1) == 1 else [*found, f"{levels.count(1)} headings of level one; keep exactly one"]
