"""Give a trained model with grouped heads latent attention: the same weights, factorised.

All keys and values of a token are linear in its hidden vector x, so they have a common factor: W = (rebuild) (down),
with the latent `down x` between. A singular value decomposition finds the best factors of any rank. Positions stand in
the way: a rotated key is not linear in x, and latent attention rotates one short key for all heads. So every key is
split in two, pair by pair:

with position   Of all groups' pairs that turn at one frequency, one complex combination becomes the pair of the shared
                rope key. A complex factor turns and stretches a pair, which commutes with rotation, so nothing is lost
                on the way: the strongest combination, an eigenvector, is kept.
position-free   What is left of the keys goes into the latent with the values, and its rotation is forgotten.

Exact, apart from float32 rounding, at full rank where nothing is left without its rotation: one group (MQA), or groups
whose keys are turned and stretched copies of each other. Otherwise the position-free part is exact only between tokens
at the same position, and wrong by more the further apart they are and the faster a pair turns. A wider rope key that
held every group's pairs would be exact, but no config can say so: frequencies in it would have to repeat.

The ways of TransMLA (arXiv 2502.07864: rotation across heads, balanced keys and values) and MHA2MLA (arXiv 2502.14837),
which train the result further; here nothing is trained.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..attention import GroupedAttention
from ..attention.latent import LATENT_EPS
from ..attention.rope import inverse_frequencies, rotation_scale, softmax_scale
from ..config import ModelConfig
from .transformer import Transformer

TINY = 2.0**-27  # latents of this size vanish beside the norm's epsilon of 1e-6, whose root divides them all alike


def to_latent(
    model: Transformer,
    kv_lora_rank: int,
    qk_rope_head_dim: int | None = None,
    calibration: Tensor | None = None,
    norm: str = "linear",
) -> Transformer:
    """Return a new model with latent attention of this rank that computes as nearly as it can what `model` computes.

    qk_rope_head_dim: width of the shared rope key. None takes the model's head_dim; a divisor of it folds neighbouring
    frequencies into one (the fastest of them), which loses more.
    calibration: tokens [batch, token] of typical text. Errors are then weighed by what the layers really read; without
    it, by the weights of the norms before them.
    norm: latent attention normalises its latent, grouped heads have no such norm. "linear" makes latents so small that
    the norm's epsilon divides them all alike: exact, but not for float16, for FP8 weights or for training on. "live"
    leaves the norm at work and fits its weight: every token's latent is off by its own size, training may go on.

    Raises ValueError for a model with latents already, with biases or too narrow a dtype, and for a rank or width that
    it cannot have.
    """
    config = _latent_config(model.config, kv_lora_rank, qk_rope_head_dim)
    if norm not in ("linear", "live"):
        raise ValueError(f"to_latent got norm={norm!r}; choose 'linear' (exact) or 'live' (to train on)")
    if norm == "linear" and model.embed_tokens.weight.dtype == torch.float16:
        raise ValueError("to_latent got a model in float16, whose range is too narrow for norm='linear'; choose "
                         "norm='live', or convert model.float()")  # fmt: skip
    roots = _input_roots(model, calibration)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".self_attn." not in name}
    for index, (layer, root) in enumerate(zip(model.layers, roots, strict=True)):
        for name, tensor in _convert(layer.self_attn, config, root, norm).items():
            state[f"layers.{index}.self_attn.{name}.weight"] = tensor
    like = model.embed_tokens.weight
    latent = Transformer(config).to(device=like.device, dtype=like.dtype)
    latent.load_state_dict(state)
    return latent.train(model.training)


def _latent_config(c: ModelConfig, rank: int, rope: int | None) -> ModelConfig:
    if c.uses_latent_attention:
        raise ValueError(f"to_latent got a model with kv_lora_rank={c.kv_lora_rank}; it has latent attention already")
    if c.attention_bias:
        raise ValueError("to_latent got a model with attention_bias=True; latent attention has no biases to keep them")
    rope = c.qk_head_dim if rope is None else rope
    if rope < 2 or rope % 2 or c.qk_head_dim % rope:
        raise ValueError(f"qk_rope_head_dim={rope}; choose an even divisor of the model's head_dim={c.qk_head_dim}, "
                         "whose frequencies are among the model's")  # fmt: skip
    full = min(2 * c.num_key_value_heads * c.qk_head_dim, c.hidden_size)
    if not 1 <= rank <= full:
        raise ValueError(f"kv_lora_rank={rank}; choose 1 to {full}, the rank of all keys and values together")
    config = c.replace(
        model_type=c.model_type if c.model_type.startswith("deepseek") else "deepseek_v3",
        num_key_value_heads=c.num_attention_heads, head_dim=None, q_lora_rank=None, kv_lora_rank=rank,
        qk_nope_head_dim=c.qk_head_dim, qk_rope_head_dim=rope, v_head_dim=c.qk_head_dim, rope_interleave=True,
    )  # fmt: skip
    if not torch.allclose(inverse_frequencies(config), inverse_frequencies(c)[:: c.qk_head_dim // rope], rtol=1e-5):
        raise ValueError(f"qk_rope_head_dim={rope} with rope_scaling of type 'yarn', whose stretched frequencies "
                         f"depend on the width; choose {c.qk_head_dim}")  # fmt: skip
    return config


@torch.no_grad()
def _input_roots(model: Transformer, tokens: Tensor | None) -> list[Tensor]:
    """Return for each layer a root of the second moments of what its attention reads, [hidden, hidden] float64."""
    if tokens is None:
        return [torch.diag(layer.input_layernorm.weight.double()) for layer in model.layers]
    moments: list[Tensor] = []

    def record(module, inputs):
        x = inputs[0].flatten(0, -2).double()
        moments.append(x.T @ x / len(x))

    hooks = [layer.self_attn.register_forward_pre_hook(record) for layer in model.layers]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    spectra = [torch.linalg.eigh(moment) for moment in moments]
    return [vectors * values.clamp(min=0).sqrt() for values, vectors in spectra]


@torch.no_grad()
def _convert(attention: GroupedAttention, config: ModelConfig, root: Tensor, norm: str) -> dict[str, Tensor]:
    """Return the weights of a LatentAttention by name, in float64."""
    c = attention.config
    width, groups, heads = c.qk_head_dim, c.num_key_value_heads, c.num_attention_heads
    keys = _pairs(attention.k_proj.weight, width)  # [group, pair, hidden]
    queries = _pairs(attention.q_proj.weight, width)  # [head, pair, hidden]
    slots = config.qk_rope_head_dim // 2

    # With position: at each slot the strongest combination of the pairs [group, fold] that turn with it.
    together = keys.view(groups, slots, -1, c.hidden_size).transpose(0, 1)
    combination = _strongest(together.flatten(1, 2), root).view(slots, groups, -1)  # [slot, group, fold], length 1
    shared = torch.einsum("sgf,sgfd->sd", combination.conj(), together)
    own = combination.repeat_interleave(heads // groups, dim=1)  # what a head's query meets: its group's share
    q_rope = torch.einsum("shf,hsfd->hsd", own.conj(), queries.view(heads, slots, -1, c.hidden_size))

    # Position-free: what the shared key does not say of each group's keys, and the values.
    rest = (together - combination[..., None] * shared[:, None, None]).transpose(0, 1).reshape(keys.shape)
    rest = torch.cat([rest.real, rest.imag], dim=1) * rotation_scale(c) ** 2  # [group, head_dim, hidden]
    values = attention.v_proj.weight.double().unflatten(0, (groups, -1))
    sizes = [(part @ root.to(part.dtype)).norm() for part in (values.flatten(0, 1), keys.flatten(0, 1))]
    balance = (sizes[0] / sizes[1]).item() if all(sizes) else 1.0  # so that keys and values count alike
    down, k_up, v_up = _factorise(rest.flatten(0, 1), values.flatten(0, 1), balance, config.kv_lora_rank, root)
    up = torch.cat([k_up.unflatten(0, (groups, -1)), v_up.unflatten(0, (groups, -1))], dim=1)
    size = ((down @ root).square().sum() / len(down)).sqrt().item() or 1.0  # root mean square of a latent
    shrink = 2.0 ** round(math.log2(TINY / size)) if norm == "linear" else 1.0

    q_nope = attention.q_proj.weight.double().unflatten(0, (heads, -1))
    query = torch.cat([q_nope, _interleaved(q_rope)], dim=1) * (softmax_scale(c) / softmax_scale(config))
    return {
        "q_proj": query.flatten(0, 1),
        "kv_a_proj_with_mqa": torch.cat([down * shrink, _interleaved(shared)]),
        "kv_a_layernorm": down.new_full((len(down),), LATENT_EPS**0.5 / shrink if norm == "linear" else size),
        "kv_b_proj": up.repeat_interleave(heads // groups, dim=0).flatten(0, 1),
        "o_proj": attention.o_proj.weight,
    }


def _pairs(weight: Tensor, width: int) -> Tensor:
    """Read the pairs (x_k, x_{k + width/2}) of weight [head * width, hidden] as complex rows [head, pair, hidden]."""
    return torch.complex(*weight.double().unflatten(0, (-1, width)).chunk(2, dim=1))


def _interleaved(pairs: Tensor) -> Tensor:
    """Write complex rows [..., pair, hidden] as real ones, neighbours together: [..., 2 * pair, hidden]."""
    return torch.stack([pairs.real, pairs.imag], dim=-2).flatten(-3, -2)


def _strongest(rows: Tensor, root: Tensor) -> Tensor:
    """Return the combination [slot, row] of length 1 that keeps most of complex rows [slot, row, hidden]."""
    outputs = rows @ root.to(rows.dtype)
    return torch.linalg.eigh(outputs @ outputs.mH).eigenvectors[..., -1]  # eigenvalues rise


def _factorise(keys: Tensor, values: Tensor, balance: float, rank: int, root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return down [rank, hidden], and up [key, rank] and [value, rank] with up @ down nearest to keys and values.

    An error in a key counts `balance` times as much as one in a value.
    """
    both = torch.cat([keys * balance, values])
    basis = torch.linalg.svd(both @ root, full_matrices=False).U[:, :rank]
    return basis.T @ both, basis[: len(keys)] / balance, basis[len(keys) :]
