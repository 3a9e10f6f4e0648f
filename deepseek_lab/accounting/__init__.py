"""What a model costs, predicted from its config alone: no tensors, no torch.

Each function returns a `Ledger`: a tree of lines whose amounts add up exactly, every line with its formula, the config
keys it used and its source. `measured` counts the same parts on live objects and shares no code with the predictions;
it is there as soon as it is asked for, and torch with it.
"""

from importlib import import_module

# Imported at once, and in this order: a function that shares its module's name must be what `accounting.<name>` finds.
from .compute import decode_flops, forward_flops, training_flops
from .decode import decode_step, equal_ridge
from .dispatch import dispatch_bytes, expected_nodes
from .ledger import Ledger, Line
from .memory import checkpoint_elements, kv_cache, weights
from .memory_state import MemoryState
from .parameters import parameters

__all__ = [
    "Ledger",
    "Line",
    "MemoryState",
    "checkpoint_elements",
    "decode_flops",
    "decode_step",
    "dispatch_bytes",
    "equal_ridge",
    "expected_nodes",
    "forward_flops",
    "kv_cache",
    "measure",
    "parameters",
    "record_step",
    "training_flops",
    "weights",
]


def __getattr__(name: str):
    if name not in ("measure", "measured", "record_step"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    measured = import_module(".measured", __name__)
    return measured if name == "measured" else getattr(measured, name)
