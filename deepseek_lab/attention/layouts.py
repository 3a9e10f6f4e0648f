"""Which caches a model can have, and the one it gets."""

import torch

from ..config import ModelConfig
from .caches import ExpandedCache, GroupedCache, LatentCache
from .fp8_cache import Fp8LatentCache
from .paged import PagedCache
from .pool import BLOCK_SIZE, BlockPool


def new_cache(
    config: ModelConfig,
    batch: int = 1,
    capacity: int = 64,
    dtype=torch.float32,
    device="cpu",
    layout: str | None = None,
):
    """Return the empty cache of one layer.

    layout: "latent" (what None means), "latent_fp8", "expanded" or "paged" for latent attention; "grouped" (None) or
    "expanded" for grouped heads. "paged" gets a pool of its own, with whole blocks for `capacity` tokens of every
    sequence; all kinds grow when that is too little. dtype: what attention reads.
    Raises ValueError for a layout that the model cannot have and for sizes that are none.
    """
    kinds = {"grouped": GroupedCache, "expanded": ExpandedCache}
    if config.uses_latent_attention:
        kinds = {"latent": LatentCache, "latent_fp8": Fp8LatentCache, "expanded": ExpandedCache, "paged": _paged}
    if layout is not None and layout not in kinds:
        kind = "latent attention" if config.uses_latent_attention else "grouped heads"
        raise ValueError(f"layout={layout!r} is not possible for a model with {kind}; "
                         f"choose one of {', '.join(kinds)}")  # fmt: skip
    for name, value in (("batch", batch), ("capacity", capacity)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"new_cache got {name}={value!r}; choose a whole number from 0 up")
    return kinds[layout or next(iter(kinds))](config, batch, capacity, dtype, device)


def _paged(config: ModelConfig, batch: int, capacity: int, dtype, device) -> PagedCache:
    blocks = max(batch * -(-capacity // BLOCK_SIZE), 1)
    return PagedCache(BlockPool(config, blocks, BLOCK_SIZE, dtype, device, grows=True), batch)
