"""Assembly: the Transformer, and its files."""

from .checkpoint import load_hf, save_hf
from .transformer import Transformer

__all__ = ["Transformer", "load_hf", "save_hf"]
