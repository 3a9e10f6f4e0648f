"""Train the shipped checkpoints anew: `python -m deepseek_lab.checkpoints`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time

import torch

from .. import data, training
from ..experts import balance
from ..generation import speculate
from ..model import Transformer, load_hf, multi_token_loss, save_hf
from ..model.files import json_writer, write_whole
from ..precision import PrecisionPolicy
from ..presets import PRESETS
from . import directory

SEED = 0
BATCH, LENGTH = 4, 512
CONFIG = PRESETS["tiny"].replace(num_nextn_predict_layers=1)
#: DeepSeek-V3's in small: a long time at the full rate, a cosine, a tail; biases that stand still at the end.
RECIPE = training.Recipe(
    steps=1600, learning_rate=4e-3, final_learning_rate=4e-4, warmup_steps=40, constant_steps=400,
    tail=((1520, 4e-4), (1560, 1.3e-4)), batch_ramp=(2, 100), precision=PrecisionPolicy(), moments="bf16",
    ema_decay=0.99, multi_token_weight=((0, 0.3), (1080, 0.1)), balance_speed=((0, 0.01), (1550, 0.0)),
    sequence_loss=1e-4,
)  # fmt: skip
#: What the card sets beside it, each for as many steps of a shorter run: one rule of the recipe left out at a time.
COMPARED_STEPS = 300
COMPARED = {
    "as shipped": {},
    "products in FP32": {"precision": PrecisionPolicy(products="fp32")},
    "without the prediction module": {"multi_token_weight": 0.0},
}


def build_tiny() -> dict:
    """Train the tiny model on the Python reference, save it in BF16 with its card, and return the card."""
    torch.set_num_threads(1)  # the sums of one thread are the same everywhere, those of several are not
    train_tokens, validation = data.split(data.python_reference())
    began, load = time.perf_counter(), 0
    model, run = start(RECIPE, train_tokens, validation)
    for record in run:
        load = load + record.load
        if record.validation_loss:
            print(f"step {record.step + 1}: loss {record.loss:.3f}, held-out {record.validation_loss:.3f}", flush=True)
    seconds = time.perf_counter() - began
    target = directory("tiny")
    with training.averaged(model):
        save_hf(model, target, dtype="bf16")
    model = load_hf(target)  # measure what is shipped: the rounded weights
    card = {
        "model": "tiny",
        "made_by": "python -m deepseek_lab.checkpoints",
        "recipe": RECIPE.settings(),
        "batch": BATCH,
        "length": LENGTH,
        "seed": SEED,
        "text": f"pydoc_data.topics of Python {platform.python_version()}, each paragraph once, a tenth held out",
        "validation_sha256": hashlib.sha256(validation.numpy().tobytes()).hexdigest(),
        "training_tokens": len(train_tokens),
        "tokens_seen": tokens_seen(RECIPE),
        "training_loss": round(training.evaluate(model, train_tokens[:65_537], LENGTH), 3),
        "validation_loss": round(training.evaluate(model, validation, LENGTH), 3),
        **{name: round(value, 3) for name, value in ahead(model, validation).items()},
        "max_violation": round(max(balance.max_violation(row) for row in load), 3),
        "minutes_on_one_core": round(seconds / 60),
        "torch": torch.__version__.split("+")[0],
        "weights": "mean of the last steps, bf16",
        f"held-out loss after {COMPARED_STEPS} steps": compare(train_tokens, validation),
    }
    write_whole(target, {"card.json": json_writer(card)})
    return card


def start(recipe: training.Recipe, train_tokens: torch.Tensor, validation: torch.Tensor):
    """Return a new model and its run."""
    torch.manual_seed(SEED)
    model = Transformer(CONFIG)
    batches = data.Batches(train_tokens, BATCH, LENGTH, SEED)
    return model, training.train(model, batches, recipe, progress=True, validation=validation)


def tokens_seen(recipe: training.Recipe) -> int:
    """Return how many tokens a run reads."""
    return LENGTH * sum(recipe.batch_at(step, BATCH) for step in range(recipe.steps))


@torch.no_grad()
def ahead(model: Transformer, validation: torch.Tensor) -> dict[str, float]:
    """Return what the prediction module knows of held-out text: its loss, and which share of its drafts stays."""
    count = min(16, len(validation) // (LENGTH + 1))
    rows = validation[: count * (LENGTH + 1)].long().view(count, -1)
    _, (loss,) = multi_token_loss(model, rows)
    texts = [speculate(model, row[None, :64], 128) for row in rows[:8]]
    return {
        "multi_token_loss": loss.item(),
        "acceptance": sum(text.accepted for text in texts) / sum(text.drafted for text in texts),
    }


def compare(train_tokens: torch.Tensor, validation: torch.Tensor) -> dict[str, float]:
    """Return the held-out loss of shorter runs by the recipe, one of its rules left out at a time."""
    found = {}
    for name, change in COMPARED.items():
        short = dataclasses.replace(
            RECIPE, steps=COMPARED_STEPS, constant_steps=COMPARED_STEPS // 4, tail=(),
            multi_token_weight=0.3, balance_speed=0.01, ema_decay=None,
        )  # fmt: skip
        *_, last = start(dataclasses.replace(short, **change), train_tokens, validation)[1]
        found[name] = round(last.validation_loss, 3)
        print(f"{COMPARED_STEPS} steps, {name}: held-out {found[name]:.3f}", flush=True)
    return found


if __name__ == "__main__":
    print(json.dumps(build_tiny(), indent=2))
