"""One serving set-up as a value: which model, stored how, for how long a context, on which GPUs, and does it fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from deepseek_lab.config import ModelConfig
from deepseek_lab.facts import GPU_MEMORY
from deepseek_lab.presets import PRESETS
from deepseek_lab.units import GIB, format_bytes

from .ledger import Ledger
from .memory import LAYOUTS, default_layout, kv_cache, weights, why_not

#: What a reader calls each preset, each format and each cache layout.
MODEL_NAMES = {
    "deepseek-v3": "DeepSeek-V3",
    "deepseek-v2": "DeepSeek-V2",
    "deepseek-v2-lite": "DeepSeek-V2-Lite",
    "llama-3.1-8b": "Llama 3.1 8B",
    "llama-3.1-70b": "Llama 3.1 70B",
    "llama-3.1-405b": "Llama 3.1 405B",
    "qwen2.5-72b": "Qwen2.5 72B",
    "tiny": "Tiny (this course)",
}
WEIGHT_NAMES = {"fp32": "FP32", "bf16": "BF16", "fp8": "FP8 with scales"}
CACHE_NAMES = {
    "expanded": "expanded (every head)",
    "grouped": "grouped heads",
    "latent": "latent",
    "latent_fp8": "latent in FP8",
}
_GPUS = ((1, "RTX 4090"), (1, "A100"), (1, "H800"), (8, "H800"), (16, "H800"), (1, "H200"), (8, "H200"))
#: GPUs to choose from: how many of which, by the name shown.
GPU_SETS: dict[str, tuple[int, str]] = {f"{count} x {name}": (count, name) for count, name in _GPUS}


@dataclass(frozen=True)
class MemoryState:
    """What a model takes in memory while it serves `batch` sequences of `context` tokens.

    model: a name in PRESETS. weights: "fp32", "bf16", "fp8". cache: a layout of `kv_cache`, in BF16 or FP8.
    context: tokens per sequence. gpu: a name in GPU_SETS. Sizes are in bytes and come from `weights` and `kv_cache`;
    activations and work buffers are left out. A setting that the model cannot have is kept, replaced by one that works
    in `layout` and `tokens`, and explained in `notes`. Raises ValueError for a name that does not exist.
    """

    model: str = "deepseek-v3"
    weights: str = "fp8"
    cache: str = "latent"
    context: int = 131_072
    batch: int = 1
    gpu: str = "8 x H800"

    def __post_init__(self):
        choices = {"model": PRESETS, "weights": WEIGHT_NAMES, "cache": LAYOUTS, "gpu": GPU_SETS}
        for field, names in choices.items():
            if getattr(self, field) not in names:
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown; choose one of {', '.join(names)}")
        for field in ("context", "batch"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field}={value!r}; choose a whole number >= 1")

    @property
    def config(self) -> ModelConfig:
        return PRESETS[self.model]

    @property
    def layout(self) -> str:
        """The cache layout that is counted: the chosen one, or the model's own where that cannot be."""
        return default_layout(self.config) if why_not(self.config, self.cache) else self.cache

    @property
    def tokens(self) -> int:
        """The context that is counted: the chosen one, or the longest that the model reads."""
        return min(self.context, self.config.max_position_embeddings)

    @cached_property
    def ledger(self) -> Ledger:
        cache = kv_cache(self.config, self.tokens, self.batch, self.layout)
        return Ledger("memory", (weights(self.config, self.weights), cache))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of the routed experts, the other weights and the cache; a dense model has weights and cache."""
        stored, cached = self.ledger.lines
        if not self.config.num_moe_layers:
            return {"weights": stored.total, "cache": cached.total}
        routed = stored["experts/routed experts"].total
        return {"routed experts": routed, "other weights": stored.total - routed, "cache": cached.total}

    @property
    def token_ledger(self) -> Ledger:
        """What one token leaves in the cache, over all layers."""
        return kv_cache(self.config, 1, 1, self.layout)

    @property
    def total(self) -> int:
        return self.ledger.total

    @property
    def capacity(self) -> int:
        """Memory of the chosen GPUs in bytes, as their data sheet prints it."""
        count, name = GPU_SETS[self.gpu]
        return count * GPU_MEMORY[name].value

    @property
    def gpus_needed(self) -> int:
        """How many of these GPUs would hold the bytes, if nothing else needed room."""
        return -(-self.total // GPU_MEMORY[GPU_SETS[self.gpu][1]].value)

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity

    @property
    def notes(self) -> tuple[str, ...]:
        """Why a chosen setting cannot be, and what is shown instead; empty where everything can."""
        name, notes = MODEL_NAMES[self.model], []
        if self.layout != self.cache:
            missing = "grouped heads" if self.config.uses_latent_attention else "latent"
            notes.append(f"{name} has no {missing}: shown with {CACHE_NAMES[self.layout]}.")
        if self.tokens != self.context:
            notes.append(f"{name} reads at most {self.tokens:,} tokens: shown with those.")
        return tuple(notes)


def summary(state: MemoryState, previous: MemoryState | None = None) -> str:
    """Return the state in one line, with what changed since `previous` where one is given."""
    sequences = "1 sequence" if state.batch == 1 else f"{state.batch:,} sequences"
    line = (
        f"{MODEL_NAMES[state.model]}, weights in {WEIGHT_NAMES[state.weights]}, "
        f"cache {CACHE_NAMES[state.layout]}, {sequences} of {state.tokens:,} tokens: {headline(state)}. "
        f"{capacity_label(state)}. {verdict(state)}"
    )
    return line if previous is None else f"{line} Against the setting before: {change(state, previous)}."


def size_text(size_bytes: int) -> str:
    """Return bytes as text in GiB, however many, and in a smaller unit below one GiB: sums then read in one unit."""
    return format_bytes(size_bytes, unit="GiB" if size_bytes >= GIB else None)


def headline(state: MemoryState) -> str:
    """Return the sum in words: "626.9 GiB weights + 8.6 GiB cache = 635.5 GiB"."""
    stored, cached = (size_text(line.total) for line in state.ledger.lines)
    return f"{stored} weights + {cached} cache = {size_text(state.total)}"


def capacity_label(state: MemoryState) -> str:
    """Return what the GPUs hold, as printed and in the bar's own family of units: "8 x H800: 640 GB = 596.0 GiB"."""
    return f"{state.gpu}: {format_bytes(state.capacity, 'GB', 0, unit='GB')} = {size_text(state.capacity)}"


def verdict(state: MemoryState) -> str:
    """Return whether the bytes fit the chosen GPUs, and how many GPUs they need."""
    gap = size_text(abs(state.capacity - state.total))
    fit = f"Fits with {gap} to spare" if state.fits else f"Too large by {gap}"
    return f"{fit}; needs {state.gpus_needed:,} {GPU_SETS[state.gpu][1]} by memory alone."


def change(state: MemoryState, previous: MemoryState) -> str:
    """Return the difference in words: "saves 601.4 GiB, 1.9x less", "4.3 GiB more, 0.7 % up"."""
    gap = state.total - previous.total
    if gap == 0:
        return "no difference"
    size, ratio = size_text(abs(gap)), max(state.total, previous.total) / min(state.total, previous.total)
    percent = f"{abs(gap) / previous.total * 100:.1f} %"
    if gap < 0:
        return f"saves {size}, {f'{ratio:,.1f}x' if ratio >= 1.1 else percent} less"
    return f"{size} more, {f'{ratio:,.1f}x as much' if ratio >= 1.1 else f'{percent} up'}"
