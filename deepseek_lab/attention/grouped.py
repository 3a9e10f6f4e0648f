"""Attention whose query heads share keys and values: MHA, GQA and MQA in one module.

With `num_key_value_heads == num_attention_heads` every head has its own keys and values (MHA); with 1 they all share
one pair (MQA); Llama 3 and Qwen 2 lie between (GQA, 8 groups).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from .caches import ExpandedCache, GroupedCache
from .masks import causal_mask, check_positions
from .rope import RotaryTable, rotate_halves, softmax_scale, turns_of_heads


class GroupedAttention(nn.Module):
    """Grouped-query attention with rotary positions, as in Llama 3 and (with biases on q, k, v) Qwen 2.

    forward(x [batch, token, hidden], positions [token] or [batch, token], cache=None, hidden=None)
    -> [batch, token, hidden].
    hidden: which slots of the cache, new ones included, are padding [batch, slot]; see `masks`.
    Raises ValueError, with the cache as it was, for positions that go back or a cache of another model or batch.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.uses_latent_attention:
            raise ValueError(f"GroupedAttention got kv_lora_rank={config.kv_lora_rank}; use LatentAttention(config)")
        self.config = config
        width, bias = config.qk_head_dim, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * width, bias=bias)
        o_bias = bias and config.model_type == "llama"  # Qwen 2 has none on the output
        self.o_proj = nn.Linear(config.num_attention_heads * width, config.hidden_size, bias=o_bias)
        self.rotary = RotaryTable(config)
        self.scale = softmax_scale(config)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: GroupedCache | ExpandedCache | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        mask = causal_mask(x, x.shape[1] + (cache.length if cache is not None else 0), hidden)
        check_positions(x, positions, cache, hidden)
        turns = turns_of_heads(self.rotary(positions))
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.config.qk_head_dim)).transpose(1, 2)  # [batch, head, token, head_dim]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate_halves(q, turns), rotate_halves(k, turns)
        if cache is not None:
            k, v = (kept.to(x.dtype) for kept in cache.append(k.to(cache.dtype), v.to(cache.dtype)))
        q, k, v = self.round_core(q), self.round_core(k), self.round_core(v)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=k.shape[1] != q.shape[1], **mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def round_core(self, x: Tensor) -> Tensor:
        """What becomes of queries, keys and values [..., channel] before they meet; see `model.apply_policy`."""
        return x
