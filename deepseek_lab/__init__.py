"""A small DeepSeek that can be opened: the library under the course.

`import deepseek_lab as lab` is cheap. Sub-packages load when they are touched, so `lab.accounting` works without torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["accounting", "attention", "checkpoints", "data", "exercises", "experts", "facts", "generation",
                "kernels", "model", "plots", "precision", "training", "units", "widgets"],
    submod_attrs={
        "config": ["ModelConfig", "RopeScaling"],
        "exercises": ["check"],
        "notebook": ["setup"],
        "presets": ["PRESETS"],
    },
)  # fmt: skip
