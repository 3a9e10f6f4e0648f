"""Which body of the kernels is in use: the torch reference, Numba's for this CPU, or the one for a GPU."""

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

BODIES = ("reference", "numba", "cuda")


def active() -> str:
    """Return "reference", "numba" or "cuda": what the environment variable LAB_KERNELS says, else numba."""
    wanted = os.environ.get("LAB_KERNELS")
    if not wanted:
        return "numba" if installed("numba") else "reference"
    if wanted not in BODIES:
        raise ValueError(f"LAB_KERNELS={wanted!r} is unknown; choose {', '.join(BODIES)}, or leave it unset")
    return wanted


@cache
def installed(package: str) -> bool:
    """Whether a package can be imported; looked up once, for a layer asks in every step."""
    return importlib.util.find_spec(package) is not None


@cache
def load(module: str) -> ModuleType:
    return importlib.import_module(f".{module}", __package__)


def body_for(x) -> ModuleType:
    """Return the module whose kernels (encode, quantize, product, permute ...) work where the tensor x lies.

    Tensors on a GPU take the CUDA body where numba-cuda is installed, those on a CPU the Numba body; LAB_KERNELS
    overrides both. The reference works everywhere.
    """
    name = active()
    if name == "numba" and x.device.type != "cpu":
        name = "cuda" if x.device.type == "cuda" and installed("numba_cuda") else "reference"
    return load({"reference": "reference", "numba": "numba_cpu", "cuda": "numba_cuda"}[name])


def body() -> ModuleType | None:
    """Return the module that writes one token, or None where the reference is in use: the torch model itself."""
    return importlib.import_module(".numba_decode", __package__) if active() == "numba" else None
