"""Attention whose query heads share keys and values: MHA, GQA and MQA in one module.

With `num_key_value_heads == num_attention_heads` every head has its own keys and values (MHA); with 1 they all share
one pair (MQA); Llama 3 and Qwen 2 lie between (GQA, 8 groups).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from .caches import GroupedCache
from .rope import RotaryTable, rotate_halves, softmax_scale


def causal_mask(x: Tensor, total: int) -> dict:
    """What `scaled_dot_product_attention` must be told so that x, the last of `total` tokens, looks back only."""
    tokens = x.shape[1]
    if tokens == total:
        return {"is_causal": True}
    if tokens == 1:
        return {}
    return {"attn_mask": x.new_ones(tokens, total, dtype=bool).tril(total - tokens)}


class GroupedAttention(nn.Module):
    """Grouped-query attention with rotary positions, as in Llama 3 and (with biases on q, k, v) Qwen 2.

    forward(x [batch, token, hidden], positions [token], cache=None) -> [batch, token, hidden].
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

    def forward(self, x: Tensor, positions: Tensor, cache: GroupedCache | None = None) -> Tensor:
        turns = self.rotary(positions)
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.config.qk_head_dim)).transpose(1, 2)  # [batch, head, token, head_dim]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate_halves(q, turns), rotate_halves(k, turns)
        if cache is not None:
            k, v = cache.append(k, v)
        q, k, v = self.round_core(q), self.round_core(k), self.round_core(v)
        shared = self.config.num_key_value_heads != self.config.num_attention_heads
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=shared, **causal_mask(x, k.shape[2]))
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def round_core(self, x: Tensor) -> Tensor:
        """What becomes of queries, keys and values [..., channel] before they meet; see `model.apply_policy`."""
        return x
