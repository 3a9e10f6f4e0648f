"""Pictures that answer to controls: layout and listening only, every number comes from `accounting` or a record."""

# Imported at once: `memory_bar` names a module and the function in it, and `widgets.memory_bar` must be the function.
from .absorption import absorption_explorer
from .accumulator import accumulator
from .base import PictureWidget
from .bit_explorer import BitExplorer, bit_explorer
from .cache_race import cache_race
from .expert_routes import expert_routes
from .memory_bar import MemoryBar, memory_bar
from .outlier_explorer import outlier_explorer
from .paged_cache import paged_cache
from .training_replay import training_replay

__all__ = [
    "BitExplorer",
    "MemoryBar",
    "PictureWidget",
    "absorption_explorer",
    "accumulator",
    "bit_explorer",
    "cache_race",
    "expert_routes",
    "memory_bar",
    "outlier_explorer",
    "paged_cache",
    "training_replay",
]
