"""A training run in one safetensors file: weights, biases, moments, and how far it got.

What a batch contains depends on its step alone and the model draws no random numbers while it trains, so the step is
the whole state of the data and of chance.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..data import Batches
from ..experts.layer import wide
from ..model import Transformer
from ..model.files import write_whole
from .recipe import Recipe

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def _run_identity(model: Transformer, recipe: Recipe, batches: Batches) -> dict[str, str]:
    """What must agree for a resumed run to be the same run."""
    return {
        "config": json.dumps(model.config.to_hf(), sort_keys=True),
        "recipe": json.dumps(recipe.settings(), sort_keys=True),
        "batches": batches.fingerprint(),
        "policy": _policies(model),
        "capacity": _capacities(model),
    }


def _capacities(model: Transformer) -> str:
    """The capacity factors of the expert layers, as text; "" where no layer drops anything."""
    factors = [layer.capacity_factor for layer in model.expert_layers()]
    return json.dumps([f if f is None else float(f) for f in factors]) if any(f is not None for f in factors) else ""


def _policies(model: Transformer) -> str:
    """Which modules compute by which `PrecisionPolicy`, as text; "" for a model that was given none."""
    names = defaultdict(list)
    for name, module in model.named_modules():
        if policy := getattr(module, "policy", None):
            rules = dataclasses.asdict(policy)
            if rules["outputs"] == "fp32":  # older files do not know the rule
                del rules["outputs"]
            names[json.dumps(rules, sort_keys=True, default=sorted)].append(name)  # sets: sorted
    return "; ".join(f"{rules} for {', '.join(modules)}" for rules, modules in names.items())


def save_state(path: str | Path, model: Transformer, optimizer, recipe: Recipe, batches: Batches, done: int) -> None:
    """Write the run after `done` steps; the file is replaced whole or not at all."""
    path = Path(path)
    tensors = {f"model.{name}": t.detach().contiguous() for name, t in _unshared(model).items()}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{kind}.{name}"] = value
    tensors |= {f"average.{name}": mean for name, mean in (model.average or {}).items()}
    metadata = {**_run_identity(model, recipe, batches), "done": str(done)}
    write_whole(path.parent, {path.name: lambda file: save_file(tensors, file, metadata=metadata)})


def load_state(path: str | Path | None, model: Transformer, optimizer, recipe: Recipe, batches: Batches) -> int:
    """Put a saved run back into model and optimizer; return how many steps it had done.

    Everything is read and compared before anything is overwritten. Raises ValueError for a missing or damaged file, and
    for one that another config, recipe, text or policy wrote.
    """
    metadata, tensors = _read(path)
    for key, value in _run_identity(model, recipe, batches).items():
        then, now = _apart(metadata.get(key, ""), value)
        if then != now:
            raise ValueError(f"{path} was written by a run with another {key}: {then or 'none'}; this one has "
                             f"{now or 'none'}")  # fmt: skip
    if not str(metadata.get("done")).isdecimal() or not 0 < int(metadata["done"]) <= recipe.steps:
        raise ValueError(
            f"{path} says it has done {metadata.get('done')} of {recipe.steps} steps; use another checkpoint"
        )
    weights = _unshared(model)
    moved = {
        name: p for name, p in model.named_parameters()  # a prediction module that had no weight yet has no moments
        if p.requires_grad and (f"step.{name}" in tensors or not name.startswith("multi_token."))
    }  # fmt: skip
    averages = [name for name, _ in model.named_parameters()] if recipe.ema_decay is not None else []
    expected = {f"model.{name}": (t.shape, t.dtype) for name, t in weights.items()}
    expected |= {f"average.{name}": (weights[name].shape, wide(weights[name].dtype)) for name in averages}
    expected |= {f"step.{name}": (torch.Size(), torch.float32) for name in moved}
    narrow = recipe.moments == "bf16"
    for kind in MOMENTS[1:]:
        expected |= {f"{kind}.{name}": (p.shape, torch.bfloat16 if narrow else p.dtype) for name, p in moved.items()}
    _check_tensors(path, tensors, expected)
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(tensors[f"model.{name}"])
    for name, parameter in moved.items():
        optimizer.state[parameter] = {kind: tensors[f"{kind}.{name}"].to(parameter.device) for kind in MOMENTS}
    model.average = {name: tensors[f"average.{name}"] for name in averages} or None
    return int(metadata["done"])


def _read(path: str | Path | None) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Return what a file says of its run, and its tensors."""
    if path is None or not Path(path).is_file():
        raise ValueError(f"resume=True needs an existing checkpoint file, got {path}; start with resume=False")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); use an earlier checkpoint") from error


def _check_tensors(path: str | Path, tensors: dict[str, torch.Tensor], expected: dict[str, tuple]) -> None:
    if odd := sorted(set(tensors) ^ set(expected)):
        raise ValueError(f"{path} and this model differ in {len(odd)} tensors, the first is {odd[0]}")
    for name, (shape, dtype) in expected.items():
        if (tensors[name].shape, tensors[name].dtype) != (shape, dtype):
            raise ValueError(f"{path}: tensor {name} is {tensors[name].dtype} of shape {list(tensors[name].shape)}, "
                             f"this run needs {dtype} of shape {list(shape)}")  # fmt: skip


def _apart(then: str, now: str) -> tuple:
    """Return two texts as a reader should see them: of two sets of settings, those that differ."""
    try:
        then, now = json.loads(then), json.loads(now)
    except ValueError:
        return then, now
    if isinstance(then, dict) and isinstance(now, dict):
        return {k: v for k, v in then.items() if v != now.get(k)}, {k: v for k, v in now.items() if v != then.get(k)}
    return then, now


def _unshared(model: Transformer) -> dict[str, torch.Tensor]:
    """The state dict without the second name of tied weights, which safetensors refuses to store twice."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
