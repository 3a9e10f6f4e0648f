"""Arrays in, arrays out: the same functions made fast. Numba is imported when the first kernel is needed."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["reference"], submod_attrs={"dispatch": ["active", "body", "body_for"]}
)
