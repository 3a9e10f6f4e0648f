"""The block that a model repeats."""

from __future__ import annotations

from torch import Tensor, nn

from ..attention import GroupedAttention, LatentAttention, RMSNorm
from ..config import ModelConfig
from ..experts import ExpertLayer, SwiGLU
from .recompute import NOTHING, after_norm


class Layer(nn.Module):
    """One pre-norm block: x += attention(norm(x)); x += feed_forward(norm(x)). `recompute`: see `Transformer`."""

    recompute: frozenset[str] = NOTHING

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LatentAttention(config) if config.uses_latent_attention else GroupedAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        has_experts = bool(config.n_routed_experts) and index >= config.num_dense_layers
        self.mlp = ExpertLayer(config) if has_experts else SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, positions: Tensor, cache=None, hidden: Tensor | None = None) -> Tensor:
        again = self.recompute if cache is None else NOTHING  # nothing is stored twice
        x = x + after_norm(self.input_layernorm, self.self_attn, x, again, positions, cache, hidden=hidden)
        return x + after_norm(self.post_attention_layernorm, self.mlp, x, again)
