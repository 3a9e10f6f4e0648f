"""Pictures that answer to controls: layout and listening only, every number comes from `accounting` or a record."""

# Imported at once: `memory_bar` names a module and the function in it, and `widgets.memory_bar` must be the function.
from .absorption import absorption_explorer
from .accumulator import accumulator
from .balance_theatre import balance_theatre
from .base import PictureWidget
from .bit_explorer import BitExplorer, bit_explorer
from .cache_race import cache_race
from .memory_bar import MemoryBar, memory_bar
from .memory_timeline import memory_timeline
from .model_map import ModelMap, model_map
from .outlier_explorer import outlier_explorer
from .paged_cache import paged_cache
from .speculation_viewer import speculation_viewer
from .token_router import TokenRouter, token_router
from .traffic_map import traffic_map
from .training_replay import training_replay

__all__ = [
    "BitExplorer",
    "MemoryBar",
    "ModelMap",
    "PictureWidget",
    "TokenRouter",
    "absorption_explorer",
    "accumulator",
    "balance_theatre",
    "bit_explorer",
    "cache_race",
    "memory_bar",
    "memory_timeline",
    "model_map",
    "outlier_explorer",
    "paged_cache",
    "speculation_viewer",
    "token_router",
    "traffic_map",
    "training_replay",
]
