"""A small model, a small text and the runs that the training tests compare."""

import torch

from deepseek_lab.config import ModelConfig
from deepseek_lab.data import Batches, ByteTokenizer
from deepseek_lab.model import Transformer
from deepseek_lab.presets import PRESETS
from deepseek_lab.training import Recipe

SMALL = PRESETS["tiny"].replace(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48,
    moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, q_lora_rank=16, kv_lora_rank=12,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
)  # fmt: skip
DENSE = ModelConfig(model_type="llama", vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.05)  # fmt: skip
RECIPE = Recipe(steps=12, learning_rate=5e-3, final_learning_rate=5e-4, warmup_steps=3)
TEXT = ByteTokenizer().encode(
    " ".join(f"{n} tokens meet {n % 7} experts, and {n % 3} of them know the way." for n in range(120))
).to(torch.int16)  # fmt: skip


def fresh(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model with the weights of this seed."""
    torch.manual_seed(seed)
    return Transformer(config)


def batches(tokens: torch.Tensor = TEXT, batch: int = 4, length: int = 24, seed: int = 0) -> Batches:
    return Batches(tokens, batch, length, seed)
