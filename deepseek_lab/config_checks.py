"""Which combinations of sizes cannot exist: each is refused with the field, its value and what would work."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import ModelConfig, RopeScaling

MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "llama", "qwen2")
DENSE_TYPES = ("llama", "qwen2")
LARGEST_SIZE = 2**31


def check_config(c: ModelConfig) -> None:
    """Raise ValueError where a model of this shape cannot be built."""
    _check_sizes(c)
    _check_rope(c)
    _check_attention(c)
    if c.n_routed_experts:
        _check_experts(c)


def check_rope_scaling(s: RopeScaling) -> None:
    """Raise ValueError where no frequencies follow from these settings."""
    if s.rope_type not in ("yarn", "llama3"):
        raise ValueError(f"rope_scaling.rope_type={s.rope_type!r} is unknown; choose 'yarn' or 'llama3', or None")
    for field in dataclasses.fields(s)[1:]:
        value = getattr(s, field.name)
        absent = value is None or (value == 0 and "mscale" in field.name)  # some files write 0 for none
        if not absent and not is_positive(value):
            raise ValueError(f"rope_scaling.{field.name}={value!r} is not a number above 0")
    if s.factor < 1:
        raise ValueError(f"rope_scaling.factor={s.factor} shrinks the context; choose a factor >= 1")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if getattr(s, low) >= getattr(s, high):
            raise ValueError(f"rope_scaling.{low}={getattr(s, low)} is not below {high}={getattr(s, high)}")


def is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _check_sizes(c: ModelConfig) -> None:
    if c.model_type not in MODEL_TYPES:
        raise ValueError(f"model_type={c.model_type!r} is unknown; choose one of {', '.join(MODEL_TYPES)}")
    foreign = [name for name in ("kv_lora_rank", "n_routed_experts", "num_nextn_predict_layers") if getattr(c, name)]
    if c.model_type in DENSE_TYPES and foreign:
        raise ValueError(f"{foreign[0]}={getattr(c, foreign[0])} in a {c.model_type}, which is dense with grouped heads"
                         " and predicts one token; choose model_type='deepseek_v3'")  # fmt: skip
    for field in dataclasses.fields(c):
        name, value, kind = field.name, getattr(c, field.name), field.type.removesuffix(" | None")
        if value is None and kind != field.type:
            continue
        least = 0 if field.default in (0, None) else 1
        if kind == "int" and (type(value) is not int or not least <= value <= LARGEST_SIZE):
            raise ValueError(f"{name}={value!r} is not a size; choose a whole number from {least} to {LARGEST_SIZE}")
        if kind == "float" and not is_positive(value):
            raise ValueError(f"{name}={value!r} is not a number above 0")
        if kind == "bool" and type(value) is not bool:
            raise ValueError(f"{name}={value!r} is neither True nor False")


def _check_rope(c: ModelConfig) -> None:
    from .config import RopeScaling

    s = c.rope_scaling
    if s is None:
        return
    if not isinstance(s, RopeScaling):
        raise ValueError(f"rope_scaling={s!r} is a {type(s).__name__}; give a RopeScaling('yarn', factor=..., ...), or "
                         "read the dict of a published file with ModelConfig.from_hf")  # fmt: skip
    if s.rope_type == "yarn" and c.rope_theta <= 1:
        raise ValueError(f"rope_theta={c.rope_theta} with rope_scaling of type 'yarn', which divides by its logarithm; "
                         "choose a rope_theta above 1, such as 10000.0")  # fmt: skip


def _check_attention(c: ModelConfig) -> None:
    if c.uses_latent_attention:
        if c.attention_bias:
            raise ValueError("attention_bias=True with latent attention; no published DeepSeek has it, set it to False")
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(c, name) < 1:
                raise ValueError(f"{name}={getattr(c, name)} with latent attention; choose a width >= 1")
    else:
        if c.num_attention_heads % c.num_key_value_heads:
            raise ValueError(f"num_key_value_heads={c.num_key_value_heads} does not divide num_attention_heads="
                             f"{c.num_attention_heads}; every group needs the same number of query heads")  # fmt: skip
        if c.head_dim is None and c.hidden_size % c.num_attention_heads:
            raise ValueError(f"num_attention_heads={c.num_attention_heads} does not divide "
                             f"hidden_size={c.hidden_size}; choose a divisor, or set head_dim")  # fmt: skip
    if c.rotary_dim % 2:
        name = "qk_rope_head_dim" if c.uses_latent_attention else "head_dim"
        raise ValueError(f"{name}={c.rotary_dim} is odd; rotary positions turn pairs of values, choose an even width")


def _check_experts(c: ModelConfig) -> None:
    n, k = c.n_routed_experts, c.num_experts_per_tok
    if c.scoring_func not in ("sigmoid", "softmax"):
        raise ValueError(f"scoring_func={c.scoring_func!r} is unknown; choose 'sigmoid' (V3) or 'softmax' (V2)")
    if c.topk_method not in ("noaux_tc", "greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method={c.topk_method!r} is unknown; choose 'noaux_tc' (V3), 'greedy' or "
                         "'group_limited_greedy' (V2)")  # fmt: skip
    if not 1 <= k <= n:
        raise ValueError(f"num_experts_per_tok={k} is not between 1 and n_routed_experts={n}; choose 1 <= k <= {n}")
    if c.moe_intermediate_size < 1:
        raise ValueError(f"moe_intermediate_size={c.moe_intermediate_size}; an expert needs a width >= 1")
    if not 0 <= c.first_k_dense_replace <= c.num_hidden_layers:
        raise ValueError(f"first_k_dense_replace={c.first_k_dense_replace} is not between 0 and num_hidden_layers="
                         f"{c.num_hidden_layers}")  # fmt: skip
    if c.topk_method == "greedy":
        return
    if n % c.n_group:
        raise ValueError(f"n_group={c.n_group} does not divide n_routed_experts={n}; every group needs the same number")
    if not 1 <= c.topk_group <= c.n_group:
        raise ValueError(f"topk_group={c.topk_group} is not between 1 and n_group={c.n_group}")
    size = n // c.n_group
    if c.topk_group * size < k:
        raise ValueError(f"topk_group={c.topk_group} groups of {size} experts cannot supply num_experts_per_tok={k}; "
                         "keep more groups")  # fmt: skip
    if c.topk_method == "noaux_tc" and size < 2 and c.topk_group < c.n_group:
        raise ValueError(f"n_group={c.n_group} leaves one expert per group, but a group's score is the sum of its two "
                         f"best; choose n_group <= {n // 2}, or topk_group={c.n_group}")  # fmt: skip
