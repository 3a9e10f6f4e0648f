"""Pictures that answer to controls: layout and listening only, every number comes from `accounting` or a record."""

# Imported at once: `memory_bar` names a module and the function in it, and `widgets.memory_bar` must be the function.
from .base import PictureWidget
from .expert_routes import expert_routes
from .memory_bar import MemoryBar, memory_bar
from .training_replay import training_replay

__all__ = ["MemoryBar", "PictureWidget", "expert_routes", "memory_bar", "training_replay"]
