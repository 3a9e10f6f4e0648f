"""What every notebook begins with, and how notebooks are executed, checked and stored.

`lab.setup()` is the first code cell. The rest is for authors and tests:

    python -m deepseek_lab.notebook run [paths]      execute, then store in the canonical form
    python -m deepseek_lab.notebook format [paths]   store in the canonical form, without executing
    python -m deepseek_lab.notebook check [paths]    say what is wrong, change nothing

Without paths: every notebook in notebooks/. The canonical form and the rules are in notebook_rules.py.
"""

import argparse
import operator
import os
import shutil
import sys
import tempfile
from pathlib import Path


def setup(seed: int = 0, threads: int | None = None) -> None:
    """Seed Python, NumPy and torch, put on the course's figure style, and fix torch's thread count when asked.

    seed:    an integer from 0 to 2**32 - 1, what NumPy accepts.
    threads: from 1 to four per processor; None leaves torch's own choice.
    """
    seed = _whole("seed", seed)
    threads = None if threads is None else _whole("threads", threads)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} is outside what NumPy accepts; choose an integer from 0 to 2**32 - 1")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads} would leave torch no thread to run on; choose 1 or more, or None")
    most = 4 * (os.cpu_count() or 1)
    if threads is not None and threads > most:
        raise ValueError(f"threads={threads} is far more than this machine's {os.cpu_count()} processors can serve; "
                         f"choose at most {most}, or None")  # fmt: skip
    import random

    import numpy
    import torch

    from deepseek_lab.plots import use_style

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)
    use_style()


def _whole(name: str, value) -> int:
    try:
        return operator.index(value)  # NumPy's integers too, which Python's own generator would not take
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"{name}={value!r} is a {kind}; choose a whole number, such as {name}=1") from None


def execute(notebook, folder: Path, timeout: int = 600):
    """Run every cell in a fresh kernel of this interpreter, with folder as working directory; return the notebook."""
    from nbclient import NotebookClient

    client = NotebookClient(
        notebook, kernel_name="python3", timeout=timeout, resources={"metadata": {"path": str(folder)}},
        store_widget_state=False, record_timing=False, coalesce_streams=True,
    )  # fmt: skip
    return client.execute()


def store(notebook, path: Path) -> None:
    """Write a notebook beside its file, then move it into place: an interruption leaves the old one whole."""
    import nbformat

    target = path.resolve()  # a link goes on pointing to the notebook
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        nbformat.write(notebook, name)
        if target.exists():
            shutil.copymode(target, name)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 1 when a notebook has a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m deepseek_lab.notebook", description="Run, check or store notebooks."
    )
    parser.add_argument("action", choices=["run", "check", "format"])
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks; without any, every one in notebooks/")
    options = parser.parse_args(arguments)
    paths = options.paths or sorted(Path("notebooks").glob("*.ipynb"))
    if not paths:
        parser.error(f"there is no notebooks/*.ipynb in {Path.cwd()}; go to the root of the course, or name notebooks")
    for path in paths:
        if not path.is_file():
            parser.error(f"{path} is {'a folder' if path.is_dir() else 'not there'}; name the .ipynb files themselves")
    import nbformat

    from deepseek_lab.notebook_rules import normalise, problems

    count = 0
    for path in paths:
        if options.action != "check":
            notebook = nbformat.read(path, as_version=4)
            if options.action == "run":
                print(f"{path}: running", flush=True)
                notebook = execute(notebook, path.parent)
            store(normalise(notebook, path.stem), path)
        for problem in problems(path):
            count += 1
            print(f"{path}: {problem}")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
