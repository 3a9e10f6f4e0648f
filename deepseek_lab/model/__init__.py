"""Assembly: the Transformer, and its files."""

from .checkpoint import load_hf, save_hf
from .convert import to_latent
from .precision import apply_policy
from .transformer import Transformer

__all__ = ["Transformer", "apply_policy", "load_hf", "save_hf", "to_latent"]
