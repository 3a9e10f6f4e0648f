"""What a checkpoint directory says of itself, read from its config and headers before a single weight is."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..config import ModelConfig
from ..precision import BLOCK
from .layout import Place, is_skipped, module_prefixes, published_copies

SCALE_SUFFIX = "_scale_inv"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def check_quantization(directory: Path) -> None:
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


def opened(file: Path):
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); copy it again") from error


def headers(directory: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Return {tensor name: (file, shape, dtype)} of every file, reading headers only."""
    found = {}
    for file in _files(directory):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safetensors file is not a dict)
                if name in found:
                    raise ValueError(
                        f"{name} stands in {found[name][0].name} and in {file.name}; a tensor has one place"
                    )
                view = tensors.get_slice(name)
                found[name] = (file, tuple(view.get_shape()), view.get_dtype())
    return found


def without_lost_modules(config: ModelConfig, found: dict) -> ModelConfig:
    """Return the config of what is there: models saved by others often still name modules that were left out."""
    modules = tuple(module_prefixes(config))
    held = any(name.startswith(modules) for name in found)
    return config if held else config.replace(num_nextn_predict_layers=0)


def check_sizes(directory: Path, config: ModelConfig, found: dict) -> None:
    """Refuse a config of more layers or experts than there are tensors, before a model of that size is laid out."""
    for name in ("num_hidden_layers", "n_routed_experts", "num_nextn_predict_layers"):
        if (getattr(config, name) or 0) > len(found):
            raise ValueError(f"{directory / 'config.json'}: {name}={getattr(config, name)} but the files hold "
                             f"{len(found)} tensors; a shard is missing, or they do not belong together")  # fmt: skip


def _check_scales(name: str, codes: tuple[int, ...], file: Path, shape: tuple[int, ...], kind: str) -> None:
    blocks = tuple(-(-size // BLOCK) for size in codes)
    if shape != blocks or kind not in ("F32", "BF16"):
        raise ValueError(f"{file}: tensor {name} is {kind} of shape {list(shape)}, expected F32 of {list(blocks)}, "
                         f"one scale per {BLOCK} x {BLOCK} block")  # fmt: skip


def check_names(directory: Path, config: ModelConfig, places: dict[str, Place], found: dict) -> None:
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
            _check_scales(scale, shape, *found[scale])
        if kind not in ("F8_E4M3", "F32", "BF16", "F16", "F64"):
            raise ValueError(f"{file}: tensor {name} has dtype {kind}; expected F32, BF16, F16 or F8_E4M3")
    known = {name + SCALE_SUFFIX for name in places if found[name][2] == "F8_E4M3"}
    known |= places.keys() | {n for n in published_copies(config) if n in found and found[n][2] != "F8_E4M3"}
    extra = sorted(name for name in found if name not in known and not is_skipped(name))
    if extra:
        raise ValueError(f"{found[extra[0]][0]}: tensor {extra[0]} is not part of this config"
                         f"{f' (nor are {len(extra) - 1} more)' if len(extra) > 1 else ''}")  # fmt: skip
