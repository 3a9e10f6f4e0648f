"""Between `ModelConfig` and the config.json of a published model.

What a file asks for and this library does not build is refused by name: a model that is almost right is wrong.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from .config import ModelConfig, RopeScaling
from .config_checks import DENSE_TYPES, MODEL_TYPES, is_positive

FIELDS = {field.name for field in dataclasses.fields(ModelConfig)}
LATENT_AND_EXPERT_FIELDS = {
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace",
    "n_group", "topk_group", "scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor",
    "num_nextn_predict_layers",
}  # fmt: skip
ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
# What a file must say: the defaults of ModelConfig are DeepSeek-V3's, not those of some other model.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What a file may leave out because it is the architecture's default.
DEFAULTS = {
    "deepseek_v3": dict(scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True),
    "deepseek_v2": dict(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False),
    "llama": dict(rms_norm_eps=1e-6),
    "qwen2": dict(attention_bias=True),
}
# Keys that change what a model computes, and the only values that this library computes.
SUPPORTED = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "use_sliding_window": (False,),
    "pretraining_tp": (1,),
    "ep_size": (1,),
    "partial_rotary_factor": (1, 1.0),
}


def read_config(source: Mapping | str | Path) -> dict:
    """Return the fields of a `ModelConfig` that a dict, a config.json or a model directory describes."""
    raw = dict(source) if isinstance(source, Mapping) else _read_json(Path(source))
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type={kind!r} is not one this library builds; it knows {', '.join(MODEL_TYPES)}")
    for key, known in SUPPORTED.items():
        if raw.get(key) is not None and raw[key] not in known:
            raise ValueError(f"{key}={raw[key]!r} is not supported; this library computes {key}={known[0]!r} only")
    missing = [key for key in SIZES if raw.get(key) is None]
    if missing:
        raise ValueError(f"the config of a {kind} lacks {', '.join(missing)}; a published config.json has them")
    rope = _mapping(raw, "rope_parameters")
    values = {**DEFAULTS[kind], **{k: v for k, v in raw.items() if k in FIELDS and v is not None}}
    values["rope_theta"] = _rope_theta(raw, rope)
    values["rope_scaling"] = _rope_scaling(_mapping(raw, "rope_scaling") or rope)
    if kind in DENSE_TYPES:
        values = {k: v for k, v in values.items() if k not in LATENT_AND_EXPERT_FIELDS}
    else:
        values["head_dim"] = None  # newer files repeat qk_rope_head_dim under this name
        values["q_lora_rank"] = raw.get("q_lora_rank")
    values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    return values


def write_config(config: ModelConfig) -> dict:
    """Return a config as a published config.json has it; `read_config` gives the same fields back."""
    dense = config.model_type in DENSE_TYPES
    skipped = {"rope_scaling"} | (LATENT_AND_EXPERT_FIELDS if dense else {"head_dim"})
    out = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in skipped}
    if out.get("head_dim", 0) is None:
        del out["head_dim"]
    out["architectures"] = [ARCHITECTURES[config.model_type]]
    out["rope_scaling"] = None
    if config.rope_scaling is not None:
        scaling = {k: v for k, v in dataclasses.asdict(config.rope_scaling).items() if v is not None}
        yarn = scaling["rope_type"] == "yarn"
        other = ("low_freq_factor", "high_freq_factor") if yarn else ("beta_fast", "beta_slow")
        out["rope_scaling"] = {k: v for k, v in scaling.items() if k not in other}
    return out


def _read_json(path: Path) -> dict:
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a model directory needs a config.json beside its weights")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the file again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a JSON {type(raw).__name__}; a config is an object with named fields")
    return raw


def _mapping(raw: Mapping, key: str) -> Mapping:
    value = raw.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{key}={value!r} is a {type(value).__name__}; expected an object with named fields, or null")
    return value or {}


def _rope_theta(raw: Mapping, rope: Mapping) -> float:
    theta = next((v for v in (raw.get("rope_theta"), rope.get("rope_theta")) if v is not None), 10000.0)
    if not is_positive(theta):
        raise ValueError(f"rope_theta={theta!r} is not a number above 0; a published config has 10000.0 or more")
    return float(theta)


def _rope_scaling(raw: Mapping) -> RopeScaling | None:
    kind = raw.get("rope_type", raw.get("type"))
    if kind in (None, "default"):
        return None
    known = {field.name for field in dataclasses.fields(RopeScaling)}
    odd = sorted(
        k for k, v in raw.items() if k not in known | {"type", "rope_theta", "attention_factor"} and v is not None
    )
    odd += ["attention_factor"] if raw.get("attention_factor") is not None else []
    if odd:
        raise ValueError(
            f"rope_scaling.{odd[0]}={raw[odd[0]]!r} is not supported; known are {', '.join(sorted(known))}"
        )
    missing = [n for n in ("factor", "original_max_position_embeddings") if raw.get(n) is None]
    if missing:
        raise ValueError(f"rope_scaling of type {kind!r} lacks {' and '.join(missing)}; add them to the config")
    return RopeScaling(
        **{k: v for k, v in raw.items() if k in known and k != "rope_type" and v is not None}, rope_type=kind
    )
