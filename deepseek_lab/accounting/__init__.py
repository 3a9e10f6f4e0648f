"""What a model costs, predicted from its config alone: no tensors, no torch.

Each function returns a `Ledger`: a tree of lines whose amounts add up exactly, every line with its formula, the config
keys it used and its source. `measured` counts the same parts on live objects and shares no code with the predictions.
"""

# Imported at once, and in this order: a function that shares its module's name must be what `accounting.<name>` finds.
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
    "decode_step",
    "dispatch_bytes",
    "equal_ridge",
    "expected_nodes",
    "kv_cache",
    "parameters",
    "weights",
]
