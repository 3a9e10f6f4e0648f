"""Assembly: the Transformer, and its files."""

from .checkpoint import load_hf, save_hf
from .precision import apply_policy
from .transformer import Transformer

__all__ = ["Transformer", "apply_policy", "load_hf", "save_hf"]
