"""One training step after another, each leaving a record; stop and go on as if nothing had happened."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .. import accounting
from ..data import Batches
from ..data.batches import check_tokens
from ..experts import balance
from ..model import Transformer, apply_policy, multi_token_loss, weighted_loss
from ..model.layout import check_whole
from .balancing import balance_loss, check_balance, listening, rebalance
from .diagnosis import first_nonfinite, first_odd_gradient
from .optimizer import make_optimizer, move_average
from .recipe import Recipe
from .run import Run
from .state import load_state


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

    With `checkpoint` a safetensors file is written every `checkpoint_every` steps, at the end, and when the run is left
    or interrupted (Ctrl-C takes effect after the running step, a second press within it; none is ever half taken).
    `resume=True` goes on from that file: on one thread, the losses are those of the uninterrupted run, bit for bit.
    `progress` shows a bar. The records of every `validate_every`-th step and of the last hold the loss on `validation`.

    Raises ValueError when the loss or a gradient is not a number, naming the step and the tensor where it began, and
    when the file belongs to another run; OSError when it cannot be written, saying what is left and how to go on.
    """
    _check_run(checkpoint, checkpoint_every, validate_every)
    _check_fit(model, batches, recipe, validation)
    run = Run(model, make_optimizer(model, recipe), recipe, batches, checkpoint)
    try:
        with run.interrupts:
            _begin(run, resume)
        for step in tqdm(range(run.done, recipe.steps), initial=run.done, total=recipe.steps, disable=not progress):
            if not run.is_current():
                raise ValueError("another train() has begun on this model since; go on with that one, or start anew")
            with run.interrupts:
                record = _step(run, step)
                run.done, run.half = step + 1, False
                if run.done % checkpoint_every == 0:
                    run.save()
            if validation is not None and (run.done % validate_every == 0 or run.done == recipe.steps):
                record = replace(record, validation_loss=evaluate(model, validation, batches.length))
            yield record
    except KeyboardInterrupt:
        raise KeyboardInterrupt(run.how_to_go_on()) from None
    except Exception as error:
        run.failed(error)
        raise
    finally:
        run.end()


def _check_run(checkpoint: str | Path | None, checkpoint_every: int, validate_every: int) -> None:
    if not torch.is_grad_enabled():
        raise ValueError("train() was called inside torch.no_grad(); call it outside, it needs gradients")
    if checkpoint is not None and Path(checkpoint).is_dir():
        raise ValueError(f"checkpoint={str(checkpoint)!r} is a directory; name a file in it, such as run.safetensors")
    for name, every in (("checkpoint", checkpoint_every), ("validate", validate_every)):
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"{name}_every={every!r}; choose 1 or more steps from one time to the next")


def _check_fit(model: Transformer, batches: Batches, recipe: Recipe, validation: Tensor | None) -> None:
    """Refuse before the first step what a later one would stumble over."""
    for given, kind in ((model, Transformer), (batches, Batches), (recipe, Recipe)):
        if not isinstance(given, kind):
            raise TypeError(f"train(model, batches, recipe) got {type(given).__name__}; expected a {kind.__name__}")
    check_balance(model.config, recipe)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("train() got a model whose parameters are all frozen; let some of them require gradients")
    if recipe.batch_ramp and recipe.batch_ramp[0] > batches.batch:
        raise ValueError(f"Recipe has batch_ramp={recipe.batch_ramp}, but a whole batch has {batches.batch} sequences; "
                         "a ramp begins with fewer")  # fmt: skip
    texts = {"batches": batches.tokens}
    if validation is not None:
        texts["validation"] = check_tokens(validation, "validation", batches.length)
    for name, tokens in texts.items():
        if (high := int(tokens.long().max())) >= model.config.vocab_size:
            raise ValueError(f"{name} has token {high}, outside the vocabulary 0..{model.config.vocab_size - 1}; was "
                             "the text encoded with this model's tokenizer?")  # fmt: skip


def _begin(run: Run, resume: bool) -> None:
    """Give the model what the recipe says, or what the file says if the run goes on."""
    model, recipe = run.model, run.recipe
    run.interrupts.firm = True  # interrupted at the wrong moment, torch would go on making all tensors "meta"
    if run.checkpoint is not None:
        check_whole(model)
        Path(run.checkpoint).parent.mkdir(parents=True, exist_ok=True)
    if recipe.precision is not None:
        apply_policy(model, recipe.precision)
    if recipe.recompute is not None:
        model.recompute = recipe.recompute
    if resume:
        run.done = run.saved = load_state(run.checkpoint, model, run.optimizer, recipe, run.batches)
    else:
        model.average = None
    model.run = run.token  # whoever starts later takes the model over


@torch.enable_grad()  # whoever asks for it
def _step(run: Run, step: int) -> StepRecord:
    began, model, recipe = time.perf_counter(), run.model, run.recipe
    model.train().zero_grad()  # whatever somebody did between two steps
    rate = recipe.learning_rate_at(step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    batch = run.batches[step][: recipe.batch_at(step, run.batches.batch)].to(model.embed_tokens.weight.device)
    weight = recipe.multi_token_weight_at(step) if len(model.multi_token) else 0.0
    (loss, *further), added, norm = _gradients(run, batch, weight, step)
    run.interrupts.firm = run.half = True  # from here on, all of the step or nothing
    run.optimizer.step()
    if recipe.ema_decay is not None:
        move_average(model, recipe.ema_decay)
    sizes = _bytes_of(model, run.optimizer)
    model.zero_grad()
    load, bias = rebalance(model, recipe.balance_speed_at(step), recipe.balance_rule, bool(weight))
    seconds, seen = time.perf_counter() - began, batch[:, 1:].numel()
    flops = seen * _flops_per_token(model.config, run.batches.length, bool(weight))
    return StepRecord(step, loss, rate, norm, seen, seconds, load, sizes, bias, added, tuple(further), flops)


def _gradients(run: Run, batch: Tensor, weight: float, step: int) -> tuple[list[float], float, float]:
    """Leave clipped gradients in the parameters; return the losses (the modules' last), the balance's and the norm."""
    model, recipe = run.model, run.recipe
    with listening(model, recipe, bool(weight)) as heard:
        loss, further = multi_token_loss(model, batch) if weight else (next_token_loss(model, batch), ())
    added = torch.as_tensor(balance_loss(heard, len(batch), model.config, recipe))
    total = weighted_loss(loss, further, weight) + added
    advice = ("the weights are left as they were before this step: lower the learning rate (now "
              f"{recipe.learning_rate_at(step):.2g}) or warm up longer")  # fmt: skip
    if not torch.isfinite(total):
        parts = {"next-token loss": loss, "balance loss": added}
        parts |= {f"loss of multi_token.{k}": part for k, part in enumerate(further)}
        where = first_nonfinite(model, batch[:, :-1], parts, bool(weight))
        raise ValueError(f"the loss of step {step} is {total.item()}: {where}; {advice}")
    total.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if not torch.isfinite(norm):
        raise ValueError(f"the gradient norm of step {step} is {norm.item()}: {first_odd_gradient(model)}; {advice}")
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), recipe.clip_norm, norm)
    return [part.item() for part in (loss, *further)], added.item(), norm.item()


_flops_per_token = cache(lambda config, length, ahead: accounting.training_flops(config, length, with_mtp=ahead).total)


def next_token_loss(model: Transformer, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats of predicting each token from those before it; batch: [batch, token + 1]."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.inference_mode()
def evaluate(model: Transformer, tokens: Tensor, length: int = 256, batch: int = 16) -> float:
    """Return the mean loss in nats per token over a text [token], read in neighbouring stretches of `length`."""
    if length < 1 or batch < 1:
        raise ValueError(f"evaluate got length={length}, batch={batch}; both are at least 1")
    windows = (len(check_tokens(tokens, "evaluate", length)) - 1) // length
    tokens = tokens[: windows * length + 1].long().to(model.embed_tokens.weight.device)
    rows = torch.stack([tokens[i * length : (i + 1) * length + 1] for i in range(windows)])
    was_training = model.training
    model.eval()
    try:
        return sum(next_token_loss(model, part).item() * len(part) for part in rows.split(batch)) / windows
    finally:
        model.train(was_training)


def _bytes_of(model: Transformer, optimizer) -> dict[str, int]:
    """Bytes of the live tensors, by part."""
    sizes = {line.part: line.total for line in accounting.measure(model, optimizer) if line.part != "cache"}
    return sizes | ({"average": sum(t.nbytes for t in model.average.values())} if model.average else {})
