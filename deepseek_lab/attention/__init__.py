"""From heads to latents: who remembers what about the tokens before."""

from .caches import ExpandedCache, GroupedCache, LatentCache
from .fp8_cache import Fp8Latent, Fp8LatentCache
from .grouped import GroupedAttention
from .latent import LatentAttention
from .layouts import new_cache
from .norm import RMSNorm
from .paged import PagedCache
from .pool import BlockPool, OutOfBlocks
from .pool_step import PoolStep, pool_step

__all__ = [
    "BlockPool",
    "ExpandedCache",
    "Fp8Latent",
    "Fp8LatentCache",
    "GroupedAttention",
    "GroupedCache",
    "LatentAttention",
    "LatentCache",
    "OutOfBlocks",
    "PagedCache",
    "PoolStep",
    "RMSNorm",
    "new_cache",
    "pool_step",
]
