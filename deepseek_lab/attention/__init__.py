"""From heads to latents: who remembers what about the tokens before."""

from .caches import GroupedCache, LatentCache
from .grouped import GroupedAttention
from .latent import LatentAttention
from .norm import RMSNorm

__all__ = ["GroupedAttention", "GroupedCache", "LatentAttention", "LatentCache", "RMSNorm"]
