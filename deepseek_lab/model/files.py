"""Write files whole or not at all."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path


def write_whole(directory: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Call each writer(temporary path), then rename them all to their names in `directory`, which is made if need be.

    A file that cannot be written changes no other, and none is ever seen half written. Files get the usual permissions,
    although safetensors would make them private.
    """
    directory.mkdir(parents=True, exist_ok=True)
    temporary = {name: directory / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            temporary[name].touch()
            usual = temporary[name].stat().st_mode
            write(temporary[name])
            temporary[name].chmod(usual)
        for name, path in temporary.items():
            os.replace(path, directory / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def json_writer(content: dict) -> Callable[[Path], object]:
    """Return the writer of a JSON file that people can read."""
    return lambda path: path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
