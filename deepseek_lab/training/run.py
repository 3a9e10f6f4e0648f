"""A run under way: what is done, what is saved, and what is left of it when it ends before its time."""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data import Batches
from ..model import Transformer
from .recipe import Recipe
from .state import save_state


class Interrupts:
    """`with interrupts:` holds Ctrl-C back until the block is done; KeyboardInterrupt follows.

    A second press gets through at once, unless the block has set `firm`, because half of what it does would be worse
    than all or nothing. After a press or an error Ctrl-C stays held until `release`: what is left is saved undisturbed.
    """

    def __init__(self):
        self.presses, self.firm, self._before = 0, False, None

    def __enter__(self) -> None:
        # Ctrl-C reaches the main thread only; who was made deaf to it, as a shell's jobs in the background, stays so.
        main = threading.current_thread() is threading.main_thread()
        if self._before is None and main and signal.getsignal(signal.SIGINT) not in (None, signal.SIG_IGN):
            self._before = signal.signal(signal.SIGINT, self._press)

    def __exit__(self, kind, *_) -> None:
        if kind is None and self.presses:
            self.firm = True
            raise KeyboardInterrupt
        if kind is None:
            self.release()

    def _press(self, _number, _frame) -> None:
        self.presses += 1
        if self.presses > 1 and not self.firm:
            self.firm = True
            raise KeyboardInterrupt

    def release(self) -> None:
        """Let Ctrl-C through again."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)  # before all else: a press may come at any moment
        self._before, self.firm = None, False


@dataclass
class Run:
    """done, saved: how many steps are done, and how many its file holds; half: whether the weights are between two."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    batches: Batches
    checkpoint: str | Path | None
    interrupts: Interrupts = field(default_factory=Interrupts)
    token: object = field(default_factory=object)
    done: int = 0
    saved: int = 0
    half: bool = False
    worth_saving: bool = True

    def is_current(self) -> bool:
        """Whether no other run of the model has begun since."""
        return getattr(self.model, "run", None) is self.token

    def save(self) -> None:
        """Write the checkpoint if there is to be one. Raises OSError saying what is left and how to go on."""
        if self.checkpoint is None:
            return
        try:
            save_state(self.checkpoint, self.model, self.optimizer, self.recipe, self.batches, self.done)
        except OSError as error:
            self.worth_saving = False  # no second try
            held = f"it holds {self.saved} steps, go on from there with resume=True" if self.saved else "start anew"
            raise OSError(f"{error}. Make room; {held}. The model keeps the weights of all {self.done} steps: "
                          "lab.model.save_hf(model, DIRECTORY) saves them elsewhere") from error  # fmt: skip
        self.saved = self.done

    def failed(self, error: Exception) -> None:
        """Decide after an error whether a file of the steps done would be better than the one that is there."""
        diverged = isinstance(error, ValueError) and self.saved > 0  # an earlier step is a better place to start from
        finite = all(torch.isfinite(p).all() for p in self.model.parameters())
        self.worth_saving &= finite and not diverged

    def end(self) -> None:
        """Leave the model ready for use, and all that was done in the file."""
        presses = self.interrupts.presses
        self.interrupts.firm = True
        self.interrupts.__enter__()
        try:
            if self.is_current():
                self.model.eval().zero_grad()
                if self.worth_saving and not self.half and self.done > self.saved:
                    self.save()
        finally:
            self.interrupts.release()
        if self.interrupts.presses > presses:
            raise KeyboardInterrupt(self.how_to_go_on())

    def how_to_go_on(self) -> str:
        """What somebody who pressed Ctrl-C has, and what to do next."""
        if not self.done:
            return "stopped before the first step was done, nothing has changed; start again"
        if self.checkpoint is None:
            kept, advice = "which the model keeps", "with train(..., checkpoint=FILE) a run can go on"
        else:
            kept, advice = f"all in {self.checkpoint}", "go on with train(..., resume=True)"
        return f"stopped after {self.done} steps, {kept}; {advice}"
