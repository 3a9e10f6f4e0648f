"""Which body of the kernels is in use: the torch reference, or the one that Numba compiles for this CPU."""

import importlib
import importlib.util
import os
from types import ModuleType

BODIES = ("reference", "numba")


def active() -> str:
    """Return "reference" or "numba": what the environment variable LAB_KERNELS says, else numba where installed."""
    wanted = os.environ.get("LAB_KERNELS")
    if not wanted:
        return "numba" if importlib.util.find_spec("numba") else "reference"
    if wanted not in BODIES:
        raise ValueError(f"LAB_KERNELS={wanted!r} is unknown; choose {' or '.join(BODIES)}, or leave it unset")
    return wanted


def body() -> ModuleType | None:
    """Return the module of compiled kernels, or None where the reference is in use: the torch model itself."""
    return importlib.import_module(".numba_cpu", __package__) if active() == "numba" else None
