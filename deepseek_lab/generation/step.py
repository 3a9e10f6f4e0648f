"""The step that writes one token: by the model itself, or by compiled kernels where these can serve the model.

A small model spends most of a step on starting torch's operations, not on its weights. The kernels read the same
weights where they lie, in one call per half of a layer. They serve what they know exactly: float32 on a CPU, latent
attention with rotary pairs, the modules of this library as they are. Whatever else comes takes the model's own path.
"""

from __future__ import annotations

import contextlib
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from ..attention import LatentAttention, RMSNorm
from ..attention.caches import LatentCache, check_new
from ..attention.rope import RotaryTable, rotate_pairs
from ..experts import ExpertLayer, Router, SwiGLU
from ..experts.layer import Experts
from ..kernels import active, body
from ..model import Transformer
from ..model.transformer import Layer

# The kernels read every weight once per row of the batch, torch's matrix products once per batch. On one thread, with
# the proportions of the tiny preset, the kernels were faster up to 64 rows of 256 values, 16 of 512 and 4 of 1024.
LARGEST_WORK = 64 * 256**2  # rows * hidden_size ** 2


class Unsupported(Exception):
    """The kernels cannot stand in for this model; not an error, the model's own path can."""


class ModelStep:
    """The definition of right: step(tokens [batch], caches) -> logits [batch, vocab], by the model itself.

    hidden [batch, slot] bool: which slots are padding, as many slots as will ever be needed; see `Transformer`.
    """

    def __init__(self, model: Transformer, hidden: Tensor | None = None):
        self._model, self._hidden = model, hidden

    def __call__(self, tokens: Tensor, caches: list) -> Tensor:
        hidden = None if self._hidden is None else self._hidden[:, : caches[0].length + 1]
        with torch.inference_mode():
            return self._model(tokens[:, None], caches, hidden)[:, -1]


class CompiledStep:
    """The same as `ModelStep` within float32 rounding, by compiled kernels; sums run in another order.

    It holds views on the weights, no copies: a training step in place shows at once, and no memory is taken. Once the
    model itself was changed (`model.to(...)`, a weight or a module replaced) the step must be made anew.
    Raises Unsupported where it cannot stand in for the model.
    """

    def __init__(self, model: Transformer, kernels: ModuleType):
        self._model, self._kernels = _expect(model, Transformer), kernels
        c = model.config
        self._embedding = self._array(_expect(model.embed_tokens, nn.Embedding).weight, c.vocab_size, c.hidden_size)
        layers = [_expect(layer, Layer) for layer in model.layers]
        self._attention = [self._attention_arrays(layer) for layer in layers]
        self._rotary = [(layer.self_attn.rotary, layer.self_attn.scale) for layer in layers]
        self._turns: list[np.ndarray] = []
        self._feed_forward = [self._feed_forward_call(layer) for layer in layers]
        self._head = (*self._norm(model.norm, c.hidden_size), self._weight(model.lm_head, c.vocab_size, c.hidden_size))

    def __call__(self, tokens: Tensor, caches: list[LatentCache]) -> Tensor:
        memories, length = self._check(tokens, caches)
        x = self._embedding[tokens.numpy()]  # [batch, hidden], a copy that the kernels add to
        for memory, arrays, turns, (_, scale), feed_forward in zip(
            memories, self._attention, self._turns, self._rotary, self._feed_forward, strict=True
        ):
            self._kernels.attention(x, *arrays, turns[length], memory, length, scale)
            feed_forward(x)
        if not all(np.isfinite(memory[:, length]).all() for memory in memories):
            for cache, memory in zip(caches, memories, strict=True):
                check_new(cache, (torch.from_numpy(memory[:, length : length + 1]),), cache._expected, cache.dtype)
        logits = torch.from_numpy(self._kernels.logits(x, *self._head))
        for cache in caches:  # only now: an interrupted step leaves no layer a token ahead of another
            cache.length = length + 1
        return logits

    # What a kernel may not be given wrong, because it does not check -----------------------------------------------

    def _check(self, tokens: Tensor, caches: list[LatentCache]) -> tuple[list[np.ndarray], int]:
        """Refuse what the kernels would misread; return the caches' buffers, with room for a token, and the length."""
        if tokens.dim() != 1 or tokens.device.type != "cpu":
            raise ValueError(f"a step got tokens of shape {tuple(tokens.shape)} on {tokens.device}; "
                             "expected [batch] on cpu")  # fmt: skip
        length = self._model._start(caches)
        self._model._check(tokens[:, None], length)
        expected = len(tokens), self._model.config.latent_width
        memories = []
        for cache in caches:
            if type(cache) is not LatentCache or cache.dtype != torch.float32 or cache.length != length:
                raise ValueError(f"a step got a {type(cache).__name__} of {cache.dtype} and length {cache.length}; "
                                 f"expected a float32 LatentCache of length {length} (model.new_caches)")  # fmt: skip
            memory = cache.reserve(1)[0].detach().numpy()  # [batch, capacity, latent + rope]
            if (memory.shape[0], memory.shape[2]) != expected:
                raise ValueError(f"a cache holds [batch, width] {memory.shape[::2]}, this step needs {expected}; "
                                 f"make new ones with model.new_caches(batch={len(tokens)})")  # fmt: skip
            memories.append(memory)
        if not self._turns or length >= len(self._turns[0]):
            positions = torch.arange(max(2 * length, 256))
            self._turns = [torch.view_as_real(rotary(positions)).numpy() for rotary, _ in self._rotary]
        return memories, length

    def _array(self, tensor: Tensor, *shape: int) -> np.ndarray:
        """Return a view on a weight, if it has the type and shape that the kernels count on."""
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            raise Unsupported
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise Unsupported
        return tensor.detach().numpy()

    def _weight(self, linear: nn.Linear, rows: int, columns: int) -> np.ndarray:
        if _expect(linear, nn.Linear).bias is not None:
            raise Unsupported
        return self._array(linear.weight, rows, columns)

    def _norm(self, norm: RMSNorm, width: int) -> tuple[np.ndarray, float]:
        return self._array(_expect(norm, RMSNorm).weight, width), float(norm.eps)

    # What each kernel is given ------------------------------------------------------------------------------------

    def _attention_arrays(self, layer: Layer) -> tuple[np.ndarray, ...]:
        a = _expect(layer.self_attn, LatentAttention)
        c = self._model.config
        if a.config != c or a.rotate is not rotate_pairs:
            raise Unsupported
        if type(a.rotary) is not RotaryTable or 2 * len(a.rotary.frequencies) != c.qk_rope_head_dim:
            raise Unsupported
        d, heads, rows = c.hidden_size, c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim
        norm, eps = self._norm(layer.input_layernorm, d)
        if c.q_lora_rank:
            q_a = self._weight(a.q_a_proj, c.q_lora_rank, d)
            q_norm, q_eps = self._norm(a.q_a_layernorm, c.q_lora_rank)
            q_b = self._weight(a.q_b_proj, heads * c.qk_head_dim, c.q_lora_rank)
        else:
            q_a, q_norm, q_eps = np.empty((0, d), np.float32), np.empty(0, np.float32), 0.0
            q_b = self._weight(a.q_proj, heads * c.qk_head_dim, d)
        kv_a = self._weight(a.kv_a_proj_with_mqa, c.latent_width, d)
        kv_norm, kv_eps = self._norm(a.kv_a_layernorm, c.kv_lora_rank)
        rebuild = self._weight(a.kv_b_proj, heads * rows, c.kv_lora_rank).reshape(heads, rows, c.kv_lora_rank)
        o_proj = self._weight(a.o_proj, d, heads * c.v_head_dim)
        return norm, q_a, q_norm, q_b, kv_a, kv_norm, rebuild, o_proj, np.array([eps, q_eps, kv_eps], np.float32)

    def _feed_forward_call(self, layer: Layer):
        """Return the function of x [batch, hidden] that adds this layer's feed-forward network to it."""
        c, kernels = self._model.config, self._kernels
        norm = self._norm(layer.post_attention_layernorm, c.hidden_size)
        if type(layer.mlp) is SwiGLU:
            weights = self._swiglu(layer.mlp, c.intermediate_size)
            return lambda x: kernels.dense(x, *norm, *weights)
        mlp = _expect(layer.mlp, ExpertLayer)
        arrays, rules = self._expert_arrays(mlp), _routing_rules(c)

        def run(x: np.ndarray) -> None:
            chosen = torch.empty(len(x), c.num_experts_per_tok, dtype=torch.int64)
            kernels.experts(x, *norm, *arrays, chosen.numpy(), *rules)
            mlp._chosen = chosen  # so that `load` counts this step, as after the model's own

        return run

    def _expert_arrays(self, mlp: ExpertLayer) -> tuple[np.ndarray, ...]:
        router, stack = _expect(mlp.gate, Router), _expect(mlp.experts, Experts)
        c = self._model.config
        if router.config != c or (mlp.training and mlp.capacity_factor is not None):
            raise Unsupported
        n, d, width = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        gate, bias = self._array(router.weight, n, d), np.zeros(n, np.float32)
        if c.topk_method == "noaux_tc":
            bias = self._array(router.e_score_correction_bias, n)
        routed = self._array(stack.gate_up_proj, n, 2 * width, d), self._array(stack.down_proj, n, d, width)
        return gate, bias, *routed, *self._swiglu(mlp.shared_experts, c.n_shared_experts * width)

    def _swiglu(self, network: SwiGLU | None, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        d = self._model.config.hidden_size
        if network is None:
            return np.empty((0, d), np.float32), np.empty((0, d), np.float32), np.empty((d, 0), np.float32)
        n = _expect(network, SwiGLU)
        gate, up = self._weight(n.gate_proj, width, d), self._weight(n.up_proj, width, d)
        return gate, up, self._weight(n.down_proj, d, width)


def decode_step(
    model: Transformer, batch: int, caches: list | None = None, hidden: Tensor | None = None
) -> ModelStep | CompiledStep:
    """Return what writes the next token of `batch` texts fastest: compiled kernels where they serve, else the model.

    The kernels know float32 latents side by side, and texts of equal length: where `caches` (None: the model's own
    kind) are others, or some slots are `hidden`, the model itself is returned.
    """
    small = batch * model.config.hidden_size**2 <= LARGEST_WORK
    plain = hidden is None and all(type(c) is LatentCache and c.dtype == torch.float32 for c in caches or ())
    known = plain and model.config.uses_latent_attention and not torch.is_autocast_enabled("cpu")
    if active() == "numba" and small and known:
        with contextlib.suppress(Unsupported):
            return CompiledStep(model, body())
    return ModelStep(model, hidden)


def _expect(module: nn.Module, kind: type):
    """Return the module if it is exactly of this kind and nothing listens to it or replaces its forward pass."""
    if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise Unsupported
    return module


def _routing_rules(c) -> tuple[bool, int, int, int, bool, float]:
    """What `Router` reads from its config: sigmoid, groups, kept groups, best per group, normalise, factor."""
    groups, kept = (1, 1) if c.topk_method == "greedy" else (c.n_group, c.topk_group)
    best = 2 if c.topk_method == "noaux_tc" else 1
    return c.scoring_func == "sigmoid", groups, kept, best, bool(c.norm_topk_prob), float(c.routed_scaling_factor)
