"""The models that the course talks about, and its own small one.

Sources: DeepSeek-V3 report (arXiv 2412.19437), section 4.2; DeepSeek-V2 report (arXiv 2405.04434), section 3.1.2 and
appendix B; their config.json files; meta-llama/llama-models, sku_list.py; config.json of Qwen2.5-72B.
"""

import dataclasses

from .config import ModelConfig, RopeScaling

_DEEPSEEK_YARN = RopeScaling("yarn", 40.0, 4096, 32.0, 1.0, 1.0, 1.0)
_LLAMA3_ROPE = RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)

_V3 = ModelConfig(
    q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
    first_k_dense_replace=3, n_group=8, topk_group=4, routed_scaling_factor=2.5, num_nextn_predict_layers=1,
    rope_scaling=_DEEPSEEK_YARN, max_position_embeddings=163840,
)  # fmt: skip
_V2 = _V3.replace(
    model_type="deepseek_v2", vocab_size=102400, hidden_size=5120, num_hidden_layers=60, intermediate_size=12288,
    n_routed_experts=160, n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1536, topk_group=3,
    first_k_dense_replace=1, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False,
    routed_scaling_factor=16.0, num_nextn_predict_layers=0,
)  # fmt: skip
_V2_LITE = _V2.replace(
    hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None,
    intermediate_size=10944, n_routed_experts=64, moe_intermediate_size=1408, n_group=1, topk_group=1,
    topk_method="greedy", routed_scaling_factor=1.0,
    rope_scaling=dataclasses.replace(_DEEPSEEK_YARN, mscale=0.707, mscale_all_dim=0.707),
)  # fmt: skip
_LLAMA_8B = ModelConfig(
    model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0, rope_scaling=_LLAMA3_ROPE,
    max_position_embeddings=131072, rms_norm_eps=1e-5,
)  # fmt: skip

#: By name. "tiny" is this course's own: DeepSeek-V3 in every part, small enough for a laptop.
PRESETS: dict[str, ModelConfig] = {
    "deepseek-v3": _V3,
    "deepseek-v2": _V2,
    "deepseek-v2-lite": _V2_LITE,
    "llama-3.1-8b": _LLAMA_8B,
    "llama-3.1-70b": _LLAMA_8B.replace(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                       num_attention_heads=64),
    "llama-3.1-405b": _LLAMA_8B.replace(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
                                        num_attention_heads=128),
    "qwen2.5-72b": _LLAMA_8B.replace(model_type="qwen2", vocab_size=152064, hidden_size=8192, intermediate_size=29568,
                                     num_hidden_layers=80, num_attention_heads=64, attention_bias=True,
                                     rope_theta=1000000.0, rope_scaling=None, max_position_embeddings=32768),
    "tiny": _V3.replace(
        vocab_size=260, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
        n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=64, first_k_dense_replace=1, n_group=4,
        topk_group=2, num_nextn_predict_layers=0, rope_scaling=None, max_position_embeddings=512,
        initializer_range=0.05),
}  # fmt: skip
