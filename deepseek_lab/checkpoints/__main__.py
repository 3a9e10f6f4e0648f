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
from ..model import Transformer, load_hf, save_hf
from ..model.files import json_writer, write_whole
from ..presets import PRESETS
from . import directory

SEED = 0
BATCH, LENGTH = 4, 512
RECIPE = training.Recipe(steps=1600, learning_rate=4e-3, final_learning_rate=2e-4, warmup_steps=40)


def build_tiny() -> dict:
    """Train the tiny model on the Python reference, save it in BF16 with its card, and return the card."""
    torch.set_num_threads(1)  # the sums of one thread are the same everywhere, those of several are not
    train_tokens, validation = data.split(data.python_reference())
    torch.manual_seed(SEED)
    model = Transformer(PRESETS["tiny"])
    batches = data.Batches(train_tokens, BATCH, LENGTH, SEED)
    began, load = time.perf_counter(), 0
    for record in training.train(model, batches, RECIPE, progress=True):
        load = load + record.load
        if record.step % 200 == 199:
            loss = training.evaluate(model, validation, LENGTH)
            print(f"step {record.step + 1}: loss {record.loss:.3f}, held-out {loss:.3f}", flush=True)
    seconds = time.perf_counter() - began
    target = directory("tiny")
    save_hf(model, target, dtype="bf16")
    model = load_hf(target)  # measure what is shipped: the rounded weights
    card = {
        "model": "tiny",
        "made_by": "python -m deepseek_lab.checkpoints",
        "recipe": dataclasses.asdict(RECIPE),
        "batch": BATCH,
        "length": LENGTH,
        "seed": SEED,
        "text": f"pydoc_data.topics of Python {platform.python_version()}, each paragraph once, a tenth held out",
        "validation_sha256": hashlib.sha256(validation.numpy().tobytes()).hexdigest(),
        "training_tokens": len(train_tokens),
        "tokens_seen": RECIPE.steps * BATCH * LENGTH,
        "training_loss": round(training.evaluate(model, train_tokens[:65_537], LENGTH), 3),
        "validation_loss": round(training.evaluate(model, validation, LENGTH), 3),
        "max_violation": round(max(balance.max_violation(row) for row in load), 3),
        "minutes_on_one_core": round(seconds / 60),
        "torch": torch.__version__.split("+")[0],
        "weights": "bf16",
    }
    write_whole(target, {"card.json": json_writer(card)})
    return card


if __name__ == "__main__":
    print(json.dumps(build_tiny(), indent=2))
