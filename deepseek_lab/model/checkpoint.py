"""Read and write models in the published layout: a directory with `config.json` and safetensors, whole or in shards.

Only safetensors are read: a pickle can run code. Everything is checked from the files' headers before a weight is
read, and a model is returned whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import ModelConfig
from ..precision import BLOCK, BlockScaled, quantize_blocks
from .files import json_writer, write_whole
from .headers import (
    INDEX,
    SCALE_SUFFIX,
    SINGLE,
    check_names,
    check_quantization,
    check_sizes,
    headers,
    opened,
    without_lost_modules,
)
from .layout import check_whole, published_copies, published_layout
from .transformer import Transformer

SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
LOADABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def load_hf(directory: str | Path, dtype: torch.dtype | str = torch.float32) -> Transformer:
    """Return the model stored in a directory, in `dtype`, in evaluation mode.

    FP8 tensors are multiplied by their `weight_scale_inv` blocks. The embedding and the head that files repeat for
    every prediction module must be the model's own; where a config names modules and the files hold none, the model has
    none. Raises ValueError, naming file and tensor, for a missing config, an unknown architecture or quantisation, a
    missing, extra or misshapen tensor, a damaged file, or a pickle.
    """
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in LOADABLE:
        raise ValueError(f"load_hf got dtype={dtype!r}; choose 'fp32', 'bf16' or one of {LOADABLE}")
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; load_hf reads a directory with config.json and safetensors")
    config = ModelConfig.from_hf(directory)
    check_quantization(directory)
    found = headers(directory)
    check_sizes(directory, config, found)
    config = without_lost_modules(config, found)
    places = published_layout(config)
    check_names(directory, config, places, found)
    with torch.device("meta"):
        model = Transformer(config)
    state = {name: torch.empty(t.shape, dtype=_kept_dtype(name, dtype)) for name, t in model.state_dict().items()}
    for file in sorted({file for file, _, _ in found.values()}):
        with opened(file) as tensors:
            for name, place in places.items():
                if found[name][0] == file:
                    state[place.name][place.index] = _read(tensors, name, found)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    _check_copies(config, state, found, dtype)
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def save_hf(model: Transformer, directory: str | Path, dtype: str = "fp32", max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a model as `config.json` and safetensors, in shards of at most `max_shard_bytes` where it is larger.

    dtype: "fp32", "bf16", or "fp8" (E4M3 codes with `weight_scale_inv` for the matrices that the released weights keep
    in FP8, BF16 for the others). The correction bias stays float32. Files are written under another name and renamed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"save_hf got dtype={dtype!r}; choose one of {', '.join(DTYPES)}")
    check_whole(model)
    directory = Path(directory)
    shards: list[dict[str, Tensor]] = [{}]
    for tensors in _published_tensors(model, dtype):
        size = sum(t.nbytes for t in tensors.values())
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1].update(tensors)
    many = len(shards)
    names = [f"model-{i + 1:05}-of-{many:05}.safetensors" for i in range(many)] if many > 1 else [SINGLE]
    config = model.config.to_hf()
    if dtype == "fp8":
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                         "weight_block_size": [BLOCK, BLOCK]}  # fmt: skip
    writers = {
        name: lambda path, tensors=tensors: save_file(tensors, path, metadata={"format": "pt"})
        for name, tensors in zip(names, shards, strict=True)
    }
    if many > 1:
        where = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        total = sum(t.nbytes for tensors in shards for t in tensors.values())
        writers[INDEX] = json_writer({"metadata": {"total_size": total}, "weight_map": where})
    writers["config.json"] = json_writer(config)
    write_whole(directory, writers)
    for old in directory.iterdir():  # what an earlier save left, and nothing else
        if old.name not in writers and (old.name in (SINGLE, INDEX) or SHARD.fullmatch(old.name)):
            old.unlink()


# Reading -----------------------------------------------------------------------------------------------------------


def _read(tensors, name: str, found: dict) -> Tensor:
    tensor = tensors.get_tensor(name)
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor
    file = found[name + SCALE_SUFFIX][0]
    with opened(file) as other:
        return BlockScaled(tensor, other.get_tensor(name + SCALE_SUFFIX)).dequantize()


def _check_copies(config: ModelConfig, state: dict[str, Tensor], found: dict, dtype: torch.dtype) -> None:
    """Refuse files whose prediction modules have an embedding or a head of their own: here they share the model's."""
    for name, own in published_copies(config).items():
        if name in found:
            with opened(found[name][0]) as tensors:
                if not torch.equal(_read(tensors, name, found).to(dtype), state[own]):
                    raise ValueError(f"{found[name][0]}: tensor {name} differs from {own}, of which it should be a "
                                     "copy; a module with a table of its own is not supported")  # fmt: skip


def _kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith("e_score_correction_bias") else dtype


# Writing -----------------------------------------------------------------------------------------------------------


def _published_tensors(model: Transformer, dtype: str) -> Iterator[dict[str, Tensor]]:
    """Yield each published tensor by name; an FP8 one together with its scales."""
    state = model.state_dict()
    for name, place in published_layout(model.config).items():
        tensor = state[place.name].detach()[place.index]
        if dtype == "fp8" and place.quantised:
            try:
                yield quantize_blocks(tensor).to_published(name)
            except ValueError as error:
                raise ValueError(f"tensor {name} cannot be saved as FP8: {error}") from error
        else:
            yield {name: _stored(tensor, name, dtype)}
    for name, own in published_copies(model.config).items():
        yield {name: _stored(state[own].detach(), name, dtype)}


def _stored(tensor: Tensor, name: str, dtype: str) -> Tensor:
    """A copy that may be written to a file: in BF16 for "fp8"."""
    kind = torch.bfloat16 if dtype == "fp8" else DTYPES[dtype]
    return tensor.to(_kept_dtype(name, kind)).contiguous().clone()
