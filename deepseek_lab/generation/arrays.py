"""What the kernels that write a token are given: views on a model's weights, where these are as the kernels expect.

Nothing is copied. A kernel checks nothing, so every shape, type and setting that it counts on is looked at here.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from ..attention import LatentAttention, RMSNorm
from ..attention.rope import RotaryTable, rotate_pairs
from ..config import ModelConfig
from ..experts import ExpertLayer, Router, SwiGLU
from ..experts.layer import Experts
from ..model.layer import Layer
from ..model.multi_token import MultiTokenModule


class Unsupported(Exception):
    """The kernels cannot stand in for this model; not an error, the model's own path can."""


def expect(module: nn.Module, kind: type):
    """Return the module if it is exactly of this kind and nothing listens to it or replaces its forward pass."""
    if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise Unsupported
    return module


class Arrays:
    """Views on the weights of a model of this config; each method raises Unsupported where a kernel would be wrong."""

    def __init__(self, config: ModelConfig, kernels: ModuleType):
        self._config, self._kernels = config, kernels

    def array(self, tensor: Tensor, *shape: int) -> np.ndarray:
        """Return a view on a weight, if it has the type and shape that the kernels count on."""
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            raise Unsupported
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise Unsupported
        return tensor.detach().numpy()

    def weight(self, linear: nn.Linear, rows: int, columns: int) -> np.ndarray:
        if expect(linear, nn.Linear).bias is not None:
            raise Unsupported
        return self.array(linear.weight, rows, columns)

    def norm(self, norm: RMSNorm, width: int) -> tuple[np.ndarray, float]:
        return self.array(expect(norm, RMSNorm).weight, width), float(norm.eps)

    def attention(self, layer: Layer) -> tuple[np.ndarray, ...]:
        """Return the weights of a layer's first half."""
        a = expect(layer.self_attn, LatentAttention)
        c = self._config
        if a.config != c or a.rotate is not rotate_pairs:
            raise Unsupported
        if type(a.rotary) is not RotaryTable or 2 * len(a.rotary.frequencies) != c.qk_rope_head_dim:
            raise Unsupported
        d, heads, rows = c.hidden_size, c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim
        norm, eps = self.norm(layer.input_layernorm, d)
        if c.q_lora_rank:
            q_a = self.weight(a.q_a_proj, c.q_lora_rank, d)
            q_norm, q_eps = self.norm(a.q_a_layernorm, c.q_lora_rank)
            q_b = self.weight(a.q_b_proj, heads * c.qk_head_dim, c.q_lora_rank)
        else:
            q_a, q_norm, q_eps = np.empty((0, d), np.float32), np.empty(0, np.float32), 0.0
            q_b = self.weight(a.q_proj, heads * c.qk_head_dim, d)
        kv_a = self.weight(a.kv_a_proj_with_mqa, c.latent_width, d)
        kv_norm, kv_eps = self.norm(a.kv_a_layernorm, c.kv_lora_rank)
        rebuild = self.weight(a.kv_b_proj, heads * rows, c.kv_lora_rank).reshape(heads, rows, c.kv_lora_rank)
        o_proj = self.weight(a.o_proj, d, heads * c.v_head_dim)
        return norm, q_a, q_norm, q_b, kv_a, kv_norm, rebuild, o_proj, np.array([eps, q_eps, kv_eps], np.float32)

    def feed_forward(self, layer: Layer):
        """Return the function of x [row, hidden] that adds this layer's feed-forward network to it."""
        c, kernels = self._config, self._kernels
        norm = self.norm(layer.post_attention_layernorm, c.hidden_size)
        if type(layer.mlp) is SwiGLU:
            weights = self._swiglu(layer.mlp, c.intermediate_size)
            return lambda x: kernels.dense(x, *norm, *weights)
        mlp = expect(layer.mlp, ExpertLayer)
        arrays, rules = self._experts(mlp), _routing_rules(c)

        def run(x: np.ndarray) -> None:
            chosen = np.empty((len(x), c.num_experts_per_tok), np.int64)
            kernels.experts(x, *norm, *arrays, chosen, *rules)
            vars(mlp)["_chosen"] = torch.from_numpy(chosen)  # so that `load` counts this step, as after the model's own

        return run

    def module(self, module: MultiTokenModule) -> tuple[tuple, tuple[np.ndarray, float]]:
        """Return what a prediction module has besides its layer: both norms and the projection; its last norm."""
        d = self._config.hidden_size
        norms = *self.norm(module.hnorm, d), *self.norm(module.enorm, d)
        return (*norms, self.weight(module.eh_proj, d, 2 * d)), self.norm(module.shared_head["norm"], d)

    def _experts(self, mlp: ExpertLayer) -> tuple[np.ndarray, ...]:
        router, stack = expect(mlp.gate, Router), expect(mlp.experts, Experts)
        c = self._config
        if router.config != c or (mlp.training and mlp.capacity_factor is not None):
            raise Unsupported
        n, d, width = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        gate, bias = self.array(router.weight, n, d), np.zeros(n, np.float32)
        if c.topk_method == "noaux_tc":
            bias = self.array(router.e_score_correction_bias, n)
        routed = self.array(stack.gate_up_proj, n, 2 * width, d), self.array(stack.down_proj, n, d, width)
        return gate, bias, *routed, *self._swiglu(mlp.shared_experts, c.n_shared_experts * width)

    def _swiglu(self, network: SwiGLU | None, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        d = self._config.hidden_size
        if network is None:
            return np.empty((0, d), np.float32), np.empty((0, d), np.float32), np.empty((d, 0), np.float32)
        n = expect(network, SwiGLU)
        gate, up = self.weight(n.gate_proj, width, d), self.weight(n.up_proj, width, d)
        return gate, up, self.weight(n.down_proj, d, width)


def _routing_rules(c) -> tuple[bool, int, int, int, bool, float]:
    """What `Router` reads from its config: sigmoid, groups, kept groups, best per group, normalise, factor."""
    groups, kept = (1, 1) if c.topk_method == "greedy" else (c.n_group, c.topk_group)
    best = 2 if c.topk_method == "noaux_tc" else 1
    return c.scoring_func == "sigmoid", groups, kept, best, bool(c.norm_topk_prob), float(c.routed_scaling_factor)
