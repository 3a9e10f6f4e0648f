"""Assembly: the Transformer, and its files."""

from .checkpoint import load_hf, save_hf
from .convert import to_latent
from .multi_token import multi_token_logits, multi_token_loss, weighted_loss
from .precision import apply_policy
from .transformer import Transformer

__all__ = [
    "Transformer",
    "apply_policy",
    "load_hf",
    "multi_token_logits",
    "multi_token_loss",
    "save_hf",
    "to_latent",
    "weighted_loss",
]
