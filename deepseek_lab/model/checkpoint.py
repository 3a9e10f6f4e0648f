"""Read and write models in the published layout: a directory with `config.json` and safetensors, whole or in shards.

Only safetensors are read: a pickle can run code. Everything is checked from the files' headers before a weight is
read, and a model is returned whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import ModelConfig
from ..precision import BLOCK, BlockScaled, quantize_blocks
from .files import json_writer, write_whole
from .layout import Place, is_skipped, published_layout
from .transformer import Transformer

SCALE_SUFFIX = "_scale_inv"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def load_hf(directory: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Return the model stored in a directory, in `dtype`, in evaluation mode.

    FP8 tensors are multiplied by their `weight_scale_inv` blocks. Tensors of multi-token prediction modules are passed
    over. Raises ValueError, naming file and tensor, for a missing config, an unknown architecture or quantisation, a
    missing, extra or misshapen tensor, a damaged file, or a pickle.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; load_hf reads a directory with config.json and safetensors")
    config = ModelConfig.from_hf(directory)
    _check_quantization(directory)
    places = published_layout(config)
    found = _headers(directory)
    _check_names(directory, config, places, found)
    with torch.device("meta"):
        model = Transformer(config)
    state = {name: torch.empty(t.shape, dtype=_kept_dtype(name, dtype)) for name, t in model.state_dict().items()}
    for file in sorted({file for file, _, _ in found.values()}):
        with _opened(file) as tensors:
            for name, place in places.items():
                if found[name][0] == file:
                    state[place.name][place.index] = _read(tensors, name, found)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
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
    directory = Path(directory)
    shards: list[dict[str, Tensor]] = [{}]
    for tensors in _published_tensors(model, dtype):
        size = sum(t.nbytes for t in tensors.values())
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1].update(tensors)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    config = model.config.to_hf()
    if dtype == "fp8":
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                         "weight_block_size": [BLOCK, BLOCK]}  # fmt: skip
    config["num_nextn_predict_layers"] = 0  # this model has no prediction module to save
    writers = {
        name: lambda path, tensors=tensors: save_file(tensors, path, metadata={"format": "pt"})
        for name, tensors in zip(names, shards, strict=True)
    }
    if len(shards) > 1:
        where = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        total = sum(t.nbytes for tensors in shards for t in tensors.values())
        writers[INDEX] = json_writer({"metadata": {"total_size": total}, "weight_map": where})
    writers["config.json"] = json_writer(config)
    write_whole(directory, writers)
    keep = {*names, *([INDEX] if len(shards) > 1 else [])}
    for old in [*directory.glob("model*.safetensors"), directory / INDEX]:
        if old.name not in keep:
            old.unlink(missing_ok=True)


# Reading -----------------------------------------------------------------------------------------------------------


def _check_quantization(directory: Path) -> None:
    quantization = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise ValueError(f"{directory / 'config.json'}: quantization_config={quantization!r} is not an object")
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or quantization.get("fmt", "e4m3") != "e4m3" or block != [BLOCK, BLOCK]:
        raise ValueError(f"{directory / 'config.json'}: quantization_config {method!r} with weight_block_size={block} "
                         f"is not known; this library reads fp8 e4m3 in blocks of [{BLOCK}, {BLOCK}]")  # fmt: skip


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is damaged ({error!r}); copy the file again") from error
        odd = sorted(
            str(n) for n in names if not isinstance(n, str) or Path(n).name != n or not n.endswith(".safetensors")
        )
        if odd:
            raise ValueError(f"{index} points to {odd[0]!r}; a shard is a .safetensors file in the same directory")
        files = [directory / name for name in sorted(names)]
    else:
        files = [directory / SINGLE]
    missing = [file for file in files if not file.is_file()]
    if not missing:
        return files
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickles:
        raise ValueError(f"{directory} has {pickles[0]} but no {missing[0].name}: a pickle can run code when opened, "
                         "so only safetensors are read; convert it where you trust it")  # fmt: skip
    raise ValueError(f"{missing[0]} does not exist; the directory needs {SINGLE}, or {INDEX} and every shard it names")


def _opened(file: Path):
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); copy it again") from error


def _headers(directory: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Return {tensor name: (file, shape, dtype)} of every file, reading headers only."""
    found = {}
    for file in _files(directory):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safetensors file is not a dict)
                if name in found:
                    raise ValueError(
                        f"{name} stands in {found[name][0].name} and in {file.name}; a tensor has one place"
                    )
                view = tensors.get_slice(name)
                found[name] = (file, tuple(view.get_shape()), view.get_dtype())
    return found


def _check_names(directory: Path, config: ModelConfig, places: dict[str, Place], found: dict) -> None:
    for name, place in places.items():
        if name not in found:
            raise ValueError(f"{directory}: tensor {name} {list(place.shape)} is missing; the files belong to another "
                             "config, or a shard is incomplete")  # fmt: skip
        file, shape, kind = found[name]
        if shape != place.shape:
            raise ValueError(f"{file}: tensor {name} has shape {list(shape)}, the config asks for {list(place.shape)}")
        scale = name + SCALE_SUFFIX
        if kind == "F8_E4M3" and scale not in found:
            raise ValueError(f"{file}: tensor {name} is FP8 but {scale} is missing; codes mean nothing without scales")
        if kind == "F8_E4M3" and len(shape) != 2:
            raise ValueError(f"{file}: tensor {name} is FP8 of shape {list(shape)}; only matrices have blocks of codes")
        if kind == "F8_E4M3":
            blocks = tuple(-(-size // BLOCK) for size in shape)
            if found[scale][1] != blocks:
                raise ValueError(f"{found[scale][0]}: tensor {scale} has shape {list(found[scale][1])}, expected "
                                 f"{list(blocks)}, one scale per {BLOCK} x {BLOCK} block")  # fmt: skip
        if kind not in ("F8_E4M3", "F32", "BF16", "F16", "F64"):
            raise ValueError(f"{file}: tensor {name} has dtype {kind}; expected F32, BF16, F16 or F8_E4M3")
    scales = {name + SCALE_SUFFIX for name in places if found[name][2] == "F8_E4M3"}
    extra = sorted(name for name in found if name not in places and name not in scales and not is_skipped(name, config))
    if extra:
        raise ValueError(f"{found[extra[0]][0]}: tensor {extra[0]} is not part of this config"
                         f"{f' (nor are {len(extra) - 1} more)' if len(extra) > 1 else ''}")  # fmt: skip


def _read(tensors, name: str, found: dict) -> Tensor:
    tensor = tensors.get_tensor(name)
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor
    file = found[name + SCALE_SUFFIX][0]
    with _opened(file) as other:
        return BlockScaled(tensor, other.get_tensor(name + SCALE_SUFFIX)).dequantize()


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
                codes, scales = quantize_blocks(tensor)
            except ValueError as error:
                raise ValueError(f"tensor {name} cannot be saved as FP8: {error}") from error
            yield {name: codes, name + SCALE_SUFFIX: scales}
        else:
            kind = torch.bfloat16 if dtype == "fp8" else DTYPES[dtype]
            yield {name: tensor.to(_kept_dtype(name, kind)).contiguous().clone()}
