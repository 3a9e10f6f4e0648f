"""Write files whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError


def write_whole(directory: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Call each writer(temporary path), then rename them all to their names in `directory`, which is made if need be.

    A file that cannot be written changes no other, and none is ever seen half written. Files get the usual permissions,
    although safetensors would make them private. What a killed process left of its attempt is removed.
    Raises OSError naming the file that could not be written, for a full disk too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _sweep(directory)
    name, unfinished = next(iter(writers)), None
    try:
        unfinished = Path(tempfile.mkdtemp(prefix=f".unfinished.{os.getpid()}.", dir=directory))
        for name, write in writers.items():
            _write(unfinished / name, write)
        for name in writers:
            os.replace(unfinished / name, directory / name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{directory / name} could not be written ({error}); what was there before stays") from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    path.touch()
    usual = path.stat().st_mode
    write(path)
    path.chmod(usual)
    with path.open("r+b") as file:
        os.fsync(file.fileno())  # on the disk before it takes the name of an older file


def _sweep(directory: Path) -> None:
    """Remove the folders in which processes that are no more did not finish."""
    for path in directory.glob(".unfinished.*.*"):
        process = path.name.split(".")[2]
        if process.isdecimal() and not _alive(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    if os.name == "nt":  # where signal 0 is no question
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def json_writer(content: dict) -> Callable[[Path], object]:
    """Return the writer of a JSON file that people can read."""
    return lambda path: path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
