"""Pictures that answer to controls: layout and listening only, every number comes from `accounting` or a record."""

# Imported at once: `memory_bar` names a module and the function in it, and `widgets.memory_bar` must be the function.
from .accumulator import accumulator
from .base import PictureWidget
from .bit_explorer import BitExplorer, bit_explorer
from .expert_routes import expert_routes
from .memory_bar import MemoryBar, memory_bar
from .outlier_explorer import outlier_explorer
from .training_replay import training_replay

__all__ = [
    "BitExplorer",
    "MemoryBar",
    "PictureWidget",
    "accumulator",
    "bit_explorer",
    "expert_routes",
    "memory_bar",
    "outlier_explorer",
    "training_replay",
]
