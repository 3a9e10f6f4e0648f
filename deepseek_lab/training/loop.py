"""One training step after another, each leaving a record; stop and go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .. import accounting
from ..data import Batches
from ..experts import balance
from ..model import Transformer, apply_policy, multi_token_loss, weighted_loss
from .balancing import balance_loss, check_balance, listening, rebalance
from .diagnosis import first_nonfinite, first_odd_gradient
from .optimizer import make_optimizer, move_average
from .recipe import Recipe
from .state import load_state, save_state


@dataclass(frozen=True)
class StepRecord:
    """What one step saw and did.

    loss is in nats per token, before the update; load [layer, expert] counts tokens; bytes holds what weights,
    gradients, optimiser moments and the mean of the weights take at the end of the step, before gradients are freed.
    bias [layer, expert] is what the routers add from the next step on, zeros where they have no bias. Layers of
    prediction modules come last. balance_loss was added to the loss for the gradient, and is not in `loss`; nor are
    multi_token_losses, one for each prediction module, whose weight is the recipe's. flops counts what the model needs
    for the step, forward and backward, whatever is computed twice. validation_loss is there where it was asked for.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    load: Tensor
    bytes: dict[str, int]
    bias: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    balance_loss: float = 0.0
    multi_token_losses: tuple[float, ...] = ()
    flops: float = 0.0
    validation_loss: float | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def mfu(self, peak: float) -> float:
        """Return the model's FLOPs per second by those that the machine can do, its `peak` in FLOP/s."""
        return self.flops / self.seconds / peak

    @property
    def max_violation(self) -> float:
        """The worst layer's MaxVio; 0 in a model without experts."""
        return max((balance.max_violation(row) for row in self.load), default=0.0)


def train(
    model: Transformer,
    batches: Batches,
    recipe: Recipe,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 200,
    resume: bool = False,
    progress: bool = False,
    validation: Tensor | None = None,
    validate_every: int = 200,
) -> Iterator[StepRecord]:
    """Train in place and yield one `StepRecord` per step.

    With `checkpoint` a safetensors file is written every `checkpoint_every` steps, at the end, and when the run is
    interrupted (Ctrl-C takes effect after the running step). `resume=True` goes on from that file: on one thread, the
    losses are those of the uninterrupted run, bit for bit. `progress` shows a bar. The records of every
    `validate_every`-th step and of the last hold the loss on the text `validation` [token] after it.

    Raises ValueError when the loss is not a number, naming the step and the tensor where it began, and when the file
    belongs to another run.
    """
    _check_run(checkpoint, checkpoint_every, validate_every)
    check_balance(model.config, recipe)
    if recipe.precision is not None:
        apply_policy(model, recipe.precision)
    if recipe.recompute is not None:
        model.recompute = recipe.recompute
    model.average = None
    optimizer = make_optimizer(model, recipe)
    start = load_state(checkpoint, model, optimizer, recipe, batches) if resume else 0
    done = saved = start
    interrupts: list = []
    model.run = run = object()  # whoever starts later takes the model over
    model.train()
    try:
        for step in tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, disable=not progress):
            if model.run is not run:
                raise ValueError("another train() has begun on this model since; go on with that one, or start anew")
            with _interrupts_wait() as interrupts:
                record = _step(model, batches, optimizer, recipe, step)
                done = step + 1
                if checkpoint is not None and done % checkpoint_every == 0 and done < recipe.steps:
                    save_state(checkpoint, model, optimizer, recipe, batches, done)
                    saved = done
            if validation is not None and (done % validate_every == 0 or done == recipe.steps):
                record = replace(record, validation_loss=evaluate(model, validation, batches.length))
            yield record
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(checkpoint, done, saved, interrupts)) from None
    except Exception:
        if saved:  # the weights may be what went wrong: better a file of an earlier step than one that cannot go on
            done = start
        raise
    finally:
        model.eval()
        # After a second Ctrl-C the last step may be half taken: then too the file stays as it was.
        if checkpoint is not None and done > start and len(interrupts) < 2 and model.run is run:
            save_state(checkpoint, model, optimizer, recipe, batches, done)


def _how_to_go_on(checkpoint: str | Path | None, done: int, saved: int, interrupts: list) -> str:
    """What somebody who pressed Ctrl-C has, and what to do next."""
    if checkpoint is None:
        return f"stopped after {done} steps, which the model keeps; with train(..., checkpoint=FILE) a run can go on"
    if len(interrupts) > 1:
        kept = f"{checkpoint} holds {saved} steps" if saved else "nothing was saved yet"
        return f"stopped within step {done}, its weights are half moved; {kept}: start from there, with resume=True"
    return f"stopped after {done} steps, all in {checkpoint}; go on with train(..., resume=True)"


def _check_run(checkpoint: str | Path | None, checkpoint_every: int, validate_every: int) -> None:
    if not torch.is_grad_enabled():
        raise ValueError("train() was called inside torch.no_grad(); call it outside, it needs gradients")
    if checkpoint is not None and Path(checkpoint).is_dir():
        raise ValueError(f"checkpoint={str(checkpoint)!r} is a directory; name a file in it, such as run.safetensors")
    for name, every in (("checkpoint", checkpoint_every), ("validate", validate_every)):
        if every < 1:
            raise ValueError(f"{name}_every={every}; choose 1 or more steps from one time to the next")


def _step(model: Transformer, batches: Batches, optimizer, recipe: Recipe, step: int) -> StepRecord:
    began = time.perf_counter()
    rate = recipe.learning_rate_at(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    batch = batches[step][: recipe.batch_at(step, batches.batch)].to(model.embed_tokens.weight.device)
    weight = recipe.multi_token_weight_at(step)
    ahead = bool(weight) and len(model.multi_token) > 0
    with listening(model, recipe, ahead) as heard:
        loss, further = multi_token_loss(model, batch) if ahead else (next_token_loss(model, batch), ())
    added = balance_loss(heard, len(batch), model.config, recipe)
    total = weighted_loss(loss, further, weight) + added
    if not torch.isfinite(total):
        raise ValueError(f"the loss of step {step} is {total.item()}: {first_nonfinite(model, batch[:, :-1])}; the "
                         "weights are left as they were before this step: lower the learning rate (now "
                         f"{rate:.2g}) or warm up longer")  # fmt: skip
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    if not torch.isfinite(norm):
        odd = first_odd_gradient(model)
        optimizer.zero_grad(set_to_none=True)
        raise ValueError(f"the gradient norm of step {step} is {norm.item()}: {odd}; the weights are left as they were "
                         f"before this step: lower the learning rate (now {rate:.2g})")  # fmt: skip
    optimizer.step()
    if recipe.ema_decay is not None:
        move_average(model, recipe.ema_decay)
    sizes = _bytes_of(model, optimizer)
    optimizer.zero_grad(set_to_none=True)
    load, bias = rebalance(model, recipe.balance_speed_at(step), recipe.balance_rule, ahead)
    seconds, seen = time.perf_counter() - began, batch[:, 1:].numel()
    extra, ahead_losses = torch.as_tensor(added).item(), tuple(part.item() for part in further)
    flops = seen * accounting.training_flops(model.config, batches.length, with_mtp=ahead).total
    return StepRecord(step, loss.item(), rate, norm.item(), seen, seconds, load, sizes, bias, extra, ahead_losses, flops)


def next_token_loss(model: Transformer, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats of predicting each token from those before it; batch: [batch, token + 1]."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.inference_mode()
def evaluate(model: Transformer, tokens: Tensor, length: int = 256, batch: int = 16) -> float:
    """Return the mean loss in nats per token over a text [token], read in neighbouring stretches of `length`."""
    if length < 1 or batch < 1:
        raise ValueError(f"evaluate got length={length}, batch={batch}; both are at least 1")
    windows = (len(tokens) - 1) // length
    if windows < 1:
        raise ValueError(f"evaluate got {len(tokens)} tokens; at least length + 1 = {length + 1} are needed")
    tokens = tokens[: windows * length + 1].long()
    rows = torch.stack([tokens[i * length : (i + 1) * length + 1] for i in range(windows)])
    was_training = model.training
    model.eval()
    total = sum(next_token_loss(model, part).item() * len(part) for part in rows.split(batch))
    model.train(was_training)
    return total / windows


def _bytes_of(model: Transformer, optimizer) -> dict[str, int]:
    """Bytes of the live tensors, by part."""
    parameters = list(model.parameters())
    moments = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    sizes = {
        "weights": sum(p.nbytes for p in parameters) + sum(b.nbytes for b in model.buffers()),
        "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "moments": sum(m.nbytes for m in moments),
    }
    return sizes | ({"average": sum(t.nbytes for t in model.average.values())} if model.average else {})


@contextlib.contextmanager
def _interrupts_wait():
    """Hold Ctrl-C back until the block is done, so that no step is half taken; a second one gets through at once."""
    pending = []
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return
    previous = signal.getsignal(signal.SIGINT)

    def hold(number, frame):
        pending.append(number)
        if len(pending) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, hold)
    try:
        yield pending
    finally:
        signal.signal(signal.SIGINT, previous)
    if pending:
        raise KeyboardInterrupt
