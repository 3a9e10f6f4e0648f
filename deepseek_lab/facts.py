"""Published numbers, each with its unit and where it was read.

`facts.V3_TRAINING_TOKENS.value` is the number and `.source` says who printed it. What the course computes itself is not
here: it comes from `accounting`. KB, GB and TB are powers of 1,000, as the sources use them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_V3 = "DeepSeek-V3 report (arXiv 2412.19437)"
_V2 = "DeepSeek-V2 report (arXiv 2405.04434)"
_INSIGHTS = "Insights into DeepSeek-V3 (arXiv 2505.09343)"
_README = "DeepSeek-V3 repository, README_WEIGHTS.md"
_METADATA = "safetensors metadata of deepseek-ai/DeepSeek-V3 on the Hugging Face Hub"


@dataclass(frozen=True)
class Fact:
    """One published number: `value` in `unit`, read in `source`; `note` says what to beware of."""

    value: int | float
    unit: str
    source: str
    note: str = ""

    def __post_init__(self):
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)) or not math.isfinite(self.value):
            raise ValueError(f"value={self.value!r} is not a number; a fact is a finite int or float")
        for name in ("unit", "source"):
            if not getattr(self, name):
                raise ValueError(f"a fact needs a {name}; got {getattr(self, name)!r} for value={self.value}")

    def __str__(self) -> str:
        return f"{self.value:,} {self.unit} ({self.source})"


def fact(value: int | float, unit: str, source: str, note: str = "") -> Fact:
    """Return a `Fact`; raises ValueError where the unit or the source is missing."""
    return Fact(value, unit, source, note)


# How large the models are ------------------------------------------------------------------------------------------

V3_PARAMETERS = fact(671_000_000_000, "parameters", f"{_V3}, section 4.2", "printed as 671B; without MTP")
V3_ACTIVE_PARAMETERS = fact(
    37_000_000_000,
    "parameters per token",
    f"{_V3}, section 4.2",
    "printed as 37B; met when the input embedding, a table, is not counted",
)
V3_README_ACTIVE_PARAMETERS = fact(
    36_700_000_000,
    "parameters per token",
    _README,
    "said to include embedding and head; not reproduced: that count is 37.6 B",
)
V3_MTP_PARAMETERS = fact(
    11_500_000_000, "parameters", _README, "printed as 11.5B unique; met by the block without eh_proj and its norms"
)
V3_MTP_PARAMETERS_IN_FILE = fact(
    14_000_000_000,
    "parameters",
    "DeepSeek-V3 repository, README.md",
    "printed as 14B; 13.46 B when embedding and head are counted again",
)
V2_PARAMETERS = fact(236_000_000_000, "parameters", f"{_V2}, section 3.1.2", "printed as 236B")
V2_ACTIVE_PARAMETERS = fact(21_000_000_000, "parameters per token", f"{_V2}, section 3.1.2", "printed as 21B")
V2_LITE_PARAMETERS = fact(15_700_000_000, "parameters", f"{_V2}, appendix B.1", "printed as 15.7B")
V2_LITE_ACTIVE_PARAMETERS = fact(2_400_000_000, "parameters per token", f"{_V2}, appendix B.1", "printed as 2.4B")

# What the published checkpoint holds, the MTP module and its copies of embedding and head included -----------------

V3_CHECKPOINT_FP8 = fact(680_571_043_840, "elements", _METADATA, "E4M3 codes; read in third-party quotations")
V3_CHECKPOINT_BF16 = fact(3_918_786_560, "elements", _METADATA, "read in third-party quotations")
V3_CHECKPOINT_FP32 = fact(41_555_600, "elements", _METADATA, "block scales and correction biases")
V3_CHECKPOINT_ELEMENTS = fact(684_531_386_000, "elements", _METADATA, "the sum, printed as 685B in README.md")
V3_CHECKPOINT_BYTES = fact(688_574_839_360, "bytes", _METADATA, "tensors only; the files are 11,888,393 bytes longer")

# What a token leaves in the cache ----------------------------------------------------------------------------------

V3_CACHE_PER_TOKEN = fact(70_272, "bytes per token", f"{_INSIGHTS}, table 1", "printed as 70.272 KB; BF16")
QWEN_72B_CACHE_PER_TOKEN = fact(327_680, "bytes per token", f"{_INSIGHTS}, table 1", "printed as 327.680 KB; BF16")
LLAMA_405B_CACHE_PER_TOKEN = fact(
    516_096,
    "bytes per token",
    f"{_INSIGHTS}, table 1",
    "printed as 516.096 KB; the 7.28x printed beside it should be 7.34x",
)
V2_SMALL_MLA_CACHE = fact(15_600, "numbers per token", f"{_V2}, table 9", "printed as 15.6K; the small model, latents")
V2_SMALL_MHA_CACHE = fact(110_600, "numbers per token", f"{_V2}, table 9", "printed as 110.6K; the small model, MHA")
FP8_LATENT_PER_TOKEN_AND_LAYER = fact(
    656,
    "bytes per token and layer",
    "FlashMLA repository, README.md",
    "512 E4M3 codes, four FP32 scales, 64 BF16 rope-key values",
)
V3_CACHE_AT_128K = fact(8.72, "GiB", "FlashMLA repository, docs/20250929", "BF16, 62 layers: the MTP layer counts")
V2_CACHE_REDUCTION = fact(
    0.933,
    "fraction saved against DeepSeek 67B",
    f"{_V2}, abstract",
    "with 6-bit cache quantisation; the element count alone gives 0.822",
)

#: Three dense models of about 7B parameters on 1.33T tokens, alike but for the heads that share keys: by the benchmark.
_SHARED_HEADS = {
    "MHA": {"BBH": 37.0, "MMLU": 45.2, "C-Eval": 42.9, "CMMLU": 43.5},
    "GQA, 8 groups": {"BBH": 35.6, "MMLU": 41.2, "C-Eval": 37.7, "CMMLU": 38.4},
    "MQA": {"BBH": 33.2, "MMLU": 37.9, "C-Eval": 30.0, "CMMLU": 34.6},
}
V2_SHARED_HEADS: dict[str, dict[str, Fact]] = {
    heads: {name: fact(value, "points", f"{_V2}, table 8") for name, value in scores.items()}
    for heads, scores in _SHARED_HEADS.items()
}
V2_SHARED_HEADS_PARAMETERS: dict[str, Fact] = {
    "MHA": fact(6_900_000_000, "parameters", f"{_V2}, table 8", "printed as 6.9B"),
    "GQA, 8 groups": fact(6_900_000_000, "parameters", f"{_V2}, table 8", "printed as 6.9B"),
    "MQA": fact(7_100_000_000, "parameters", f"{_V2}, table 8", "printed as 7.1B"),
}

# Reading a prompt and writing an answer ----------------------------------------------------------------------------

V3_PREFILL_GPUS = fact(32, "GPUs", f"{_V3}, section 3.4.1", "the smallest unit: 4 nodes")
V3_DECODE_GPUS = fact(320, "GPUs", f"{_V3}, section 3.4.2", "the smallest unit: 40 nodes")
V3_DECODE_EXPERT_BATCH = fact(
    256, "tokens per expert", f"{_V3}, section 3.4.2", "usually no more; memory is the limit there, not arithmetic"
)
DECODE_CONTEXT = fact(
    4_989, "tokens", "open-infra-index repository, day 6", "mean length of the cache over all output tokens of a day"
)
FLASHMLA_COMPUTE = fact(
    660_000_000_000_000, "FLOP/s", "FlashMLA repository, README.md", "up to, on an H800, bound by arithmetic"
)
FLASHMLA_BANDWIDTH = fact(
    3_000_000_000_000, "bytes/s", "FlashMLA repository, README.md", "up to, on an H800, bound by memory"
)
V3_TRAINING_FLOP = fact(
    250e9, "FLOP per token", f"{_INSIGHTS}, table 2", "at 4,096 tokens; three times a forward pass, as usual"
)

# How V3 was trained ------------------------------------------------------------------------------------------------

V3_TRAINING_TOKENS = fact(14_800_000_000_000, "tokens", f"{_V3}, section 4.1", "printed as 14.8T")
V3_SEQUENCE_LENGTH = fact(4_096, "tokens", f"{_V3}, section 4.2")
V3_FIRST_BATCH = fact(3_072, "sequences", f"{_V3}, section 4.2", "grows to the full batch over the first 469B tokens")
V3_FULL_BATCH = fact(15_360, "sequences", f"{_V3}, section 4.2")
V3_PEAK_LEARNING_RATE = fact(2.2e-4, "per step", f"{_V3}, section 4.2", "held up to 10T tokens, then a cosine")
V3_LOW_LEARNING_RATE = fact(2.2e-5, "per step", f"{_V3}, section 4.2", "held for 333B tokens after the cosine")
V3_LAST_LEARNING_RATE = fact(7.3e-6, "per step", f"{_V3}, section 4.2", "the last 167B tokens")
V3_WARMUP = fact(2_000, "steps", f"{_V3}, section 4.2")
V3_ADAM_BETA1 = fact(0.9, "per step", f"{_V3}, section 4.2")
V3_ADAM_BETA2 = fact(0.95, "per step", f"{_V3}, section 4.2")
V3_WEIGHT_DECAY = fact(0.1, "times learning rate per step", f"{_V3}, section 4.2")
V3_GRADIENT_CLIP = fact(1.0, "gradient norm", f"{_V3}, section 4.2")
V3_INIT_STD = fact(0.006, "standard deviation", f"{_V3}, section 4.2")
V3_BIAS_SPEED = fact(0.001, "per step", f"{_V3}, section 4.2", "0 for the last 500B tokens")
V3_BALANCE_LOSS = fact(1e-4, "times the sequence-wise loss", f"{_V3}, section 4.2")
V3_MTP_LOSS = fact(0.3, "times the MTP loss", f"{_V3}, section 4.2", "0.1 for the last 4.8T tokens")
V3_FP8_LOSS_GAP = fact(
    0.0025, "relative loss error", f"{_V3}, section 3.3", "an upper bound: FP8 stayed below it against BF16"
)
V3_FP8_CHECK_SMALL = fact(1.33e12, "tokens", f"{_V3}, appendix B.1", "a model of about 16B parameters, FP8 and BF16")
V3_FP8_CHECK_LARGE = fact(0.9e12, "tokens", f"{_V3}, appendix B.1", "a model of about 230B parameters, FP8 and BF16")
V3_BLOCK_GRADIENTS_DIVERGED = fact(
    300e9, "tokens", f"{_V3}, appendix B.2", "about 16B parameters, activation gradients in blocks of 128 x 128"
)

# How eight-bit products are added up -------------------------------------------------------------------------------

V3_ACCUMULATOR_BITS = fact(14, "bits", f"{_V3}, section 3.5.2", "of each aligned product, the leading bit too")
V3_EXACT_SUM_BITS = fact(34, "bits", f"{_V3}, section 3.5.2", "at least, for 32 products; how it counts is not said")
V3_ACCUMULATION_ERROR = fact(
    0.02,
    "maximum relative error",
    f"{_V3}, section 3.3.2",
    "nearly 2 % at K = 4096; the distribution of the two random matrices is not printed, so it is not reproduced",
)
V3_PROMOTION_INTERVAL = fact(128, "products", f"{_V3}, section 3.3.2", "four instructions of 32 products")
H800_FRACTION_BITS = fact(13, "fraction bits", f"{_INSIGHTS}, section 3.1.1", "after 32 products are aligned")
B200_ACCUMULATOR_BITS = fact(25, "bits of mantissa", "GitHub issue deepseek-ai/DeepGEMM#176", "measured by a user")
DEEPGEMM_TOLERANCE = fact(
    1e-3, "calc_diff", "DeepGEMM repository, tests (commit 54e2261)", "1 - 2xy / (xx + yy) of FP8 and BF16 results"
)

# Where experts live and how tokens reach them ---------------------------------------------------------------------

V3_NODE_LIMIT = fact(4, "nodes per token", f"{_V3}, section 3.2.2")
V3_EXPERT_NODES = fact(8, "nodes", f"{_V3}, section 3.2", "64-way expert parallelism in training: 4 experts on a GPU")
V3_FREE_EXPERTS_PER_NODE = fact(
    3.2, "experts per node", f"{_V3}, section 3.2.2", "on average: NVLink is 3.2 times as fast as the network"
)
V3_REDUNDANT_EXPERTS = fact(32, "experts", f"{_V3}, section 3.4.1", "while prompts are read: one more on each GPU")

MASSIVE_ACTIVATIONS = fact(
    100_000, "times as large as others", "Massive Activations in Large Language Models (arXiv 2402.17762), abstract",
    "an example: very few of a large model's activations",
)  # fmt: skip

# What it cost ------------------------------------------------------------------------------------------------------

V3_TRAINING_GPUS = fact(2_048, "H800 GPUs", f"{_V3}, section 3.1")
V3_PRETRAINING_HOURS = fact(2_664_000, "GPU-hours", f"{_V3}, table 1")
V3_CONTEXT_EXTENSION_HOURS = fact(119_000, "GPU-hours", f"{_V3}, table 1")
V3_POST_TRAINING_HOURS = fact(5_000, "GPU-hours", f"{_V3}, table 1")
V3_TRAINING_HOURS = fact(2_788_000, "GPU-hours", f"{_V3}, table 1")
V3_HOURS_PER_TRILLION_TOKENS = fact(180_000, "GPU-hours per trillion tokens", f"{_V3}, section 1")
H800_RENT = fact(2.0, "$/GPU-hour", f"{_V3}, table 1", "assumed by the report")
V3_TRAINING_COST = fact(
    5_576_000, "$", f"{_V3}, table 1", "the final run only: earlier research and ablations excluded"
)

# What the machines hold and do -------------------------------------------------------------------------------------

_H100, _PRINTED = "NVIDIA H100 SXM data sheet", "the data sheet's GB taken as 10^9 bytes"

#: Memory of one GPU in bytes, by the name the course uses.
GPU_MEMORY: dict[str, Fact] = {
    "H800": fact(80_000_000_000, "bytes", f"{_H100}; {_INSIGHTS}, section 4.1, for what an H800 changes", _PRINTED),
    "H100": fact(80_000_000_000, "bytes", _H100, _PRINTED),
    "H200": fact(141_000_000_000, "bytes", "NVIDIA H200 data sheet", _PRINTED),
    "A100": fact(80_000_000_000, "bytes", "NVIDIA A100 80GB data sheet", _PRINTED),
    "RTX 4090": fact(24_000_000_000, "bytes", "NVIDIA GeForce RTX 4090 specification", _PRINTED),
}
H100_REPORTED_MEMORY = fact(
    81_559,
    "MiB",
    "nvidia-smi, quoted in GitHub issue NVIDIA/nccl#1264",
    "85.5 GB, of which driver and framework keep a part: the printed 80 GB is the safe figure",
)
GPUS_PER_NODE = fact(8, "GPUs per node", f"{_V3}, section 3.1", "H800s joined by NVLink within a node")
H800_BANDWIDTH = fact(3.35e12, "bytes/s", _H100, "HBM3; the H800 has the same")
H800_BF16_PEAK = fact(989.4e12, "FLOP/s", _H100, "dense; read in a secondary source")
H800_FP8_PEAK = fact(1_978.9e12, "FLOP/s", _H100, "dense; read in a secondary source")
H800_FP32_PEAK = fact(66.9e12, "FLOP/s", _H100, "CUDA cores, not tensor cores; read in a secondary source")
H800_NVLINK = fact(400e9, "bytes/s", f"{_INSIGHTS}, section 4.1", "both directions together; 900e9 on an H100")
NODE_NETWORK = fact(50e9, "bytes/s per GPU", f"{_INSIGHTS}, section 4", "eight 400 Gb/s InfiniBand cards per node")
