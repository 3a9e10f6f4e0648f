"""Pictures that answer to controls: layout and listening only, every number comes from `accounting` or a record."""

# Imported at once: `memory_bar` names a module and the function in it, and `widgets.memory_bar` must be the function.
from .memory_bar import MemoryBar, memory_bar

__all__ = ["MemoryBar", "memory_bar"]
