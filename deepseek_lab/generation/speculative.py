"""Speculative decoding: prediction modules guess, the model checks, and the text is what the model alone would write.

A pass of the model over two tokens costs hardly more than over one, since the weights are read once for both. So its
prediction modules draft the next tokens, and one pass reads the last token and all drafts. Wherever the model would
have written the draft itself, it has been saved a pass; at the first other token it writes its own, and the caches
forget what was read behind it. With one module, whose drafts are right with probability p, a pass writes 1 + p tokens.

Drawn texts follow the model's own distribution: a draft that was drawn with probability q, and that the model gives p,
is accepted with probability min(1, p / q); if it is not, a token is drawn from max(0, p - q), made to sum to 1.
Sources: Leviathan, Kalman and Matias (arXiv 2211.17192), section 2.3; DeepSeek-V3 report, section 5.4.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Transformer
from .decode import chances, check_settings, sample
from .step import ModelStep, decode_step


@dataclass(frozen=True)
class SpeculationStep:
    """One pass of the model: `drafted` tokens were checked, `written` stand in the text from `place` on.

    written: the accepted drafts, then one token of the model's own. odds: with which probability each draft that was
    looked at would be accepted; 0 or 1 in a greedy text. Those behind a refused draft are not looked at.
    """

    place: int
    drafted: tuple[int, ...]
    written: tuple[int, ...]
    odds: tuple[float, ...]

    @property
    def accepted(self) -> int:
        return len(self.written) - 1


@dataclass(frozen=True)
class Speculation:
    """A text [1, length] int64, prompt included, and how it came about.

    drafted and accepted count tokens; steps holds every pass after the one that read the prompt and wrote a token.
    """

    tokens: Tensor
    drafted: int
    accepted: int
    steps: tuple[SpeculationStep, ...]

    @property
    def acceptance(self) -> float:
        """Share of the drafts that stand in the text; 0 where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a pass of the model wrote, on average; 0 where there was none behind the prompt."""
        return sum(len(step.written) for step in self.steps) / len(self.steps) if self.steps else 0.0


def speculate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    layout: str | None = None,
) -> Speculation:
    """Continue one prompt [1, token] as `generate` does, in fewer passes of the model; settings as there.

    At temperature 0 the text is that of `generate`, token by token: where compiled kernels serve, every logit is the
    same in every bit; elsewhere sums run in another order, and a tie within that rounding may fall the other way. Above
    0 the text has the same distribution, drawn with other random numbers.
    Raises ValueError as `generate`, for a model without prediction modules, and for more than one text.
    """
    max_new_tokens = check_settings(model, tokens, None, max_new_tokens, temperature, top_p)
    if len(tokens) != 1:
        raise ValueError(f"speculate got {len(tokens)} texts, each of which would accept other drafts; call it for one "
                         "at a time: speculate(model, tokens[i : i + 1], ...)")  # fmt: skip
    if not model.multi_token:
        raise ValueError("speculate needs a model with prediction modules, this one has num_nextn_predict_layers=0; "
                         "use generate")  # fmt: skip
    judge = _Drawn(temperature, top_p, seed, tokens.device) if temperature else _Greedy()
    text, steps = _write(model, tokens, max_new_tokens, layout, judge)
    drafted, accepted = sum(len(step.drafted) for step in steps), sum(step.accepted for step in steps)
    return Speculation(torch.tensor([text], device=tokens.device), drafted, accepted, tuple(steps))


def _write(
    model: Transformer, tokens: Tensor, count: int, layout: str | None, judge: _Greedy | _Drawn
) -> tuple[list[int], list[SpeculationStep]]:
    """Return the text and the steps. Between two steps the caches hold all of the text but its last token."""
    depth, end = len(model.multi_token), tokens.shape[1] + count
    caches, own = (model.new_caches(1, end, layout, modules) for modules in (False, True))
    whole, step = ModelStep(model), decode_step(model, 1, caches)
    logits, states = whole.read(tokens, caches)  # the prompt at once
    text, steps = [*tokens[0].tolist(), judge.draw(logits[0, -1:])], []
    while len(text) < end:
        read, drafts = len(text) - 1, []
        if len(text) + 1 < end:
            drafts = _draft(step if steps else whole, states, text, own, judge)[: end - len(text) - 1]
        logits, new = step.read(torch.tensor([[text[-1], *drafts]], device=tokens.device), caches)
        written, odds = judge.check(logits[0], drafts)
        steps.append(SpeculationStep(len(text), tuple(drafts), tuple(written), odds))
        text += written
        for cache in caches:
            cache.truncate(len(text) - 1)
        states = _sound(states, new[:, : len(written)], read, len(text) - 1 - depth, own)
    return text, steps


def _sound(states: Tensor, new: Tensor, read: int, sound: int, own: list) -> Tensor:
    """Let the modules forget slots from `sound` on and return all states that they have not read then.

    The module of depth k saw token t + k in slot t: drafts, in its last k - 1 slots. All modules forget as many.
    """
    sound = max(sound, 0)
    if sound >= read:
        return new
    for cache in own:
        cache.truncate(min(sound, cache.length))
    return torch.cat([states[:, states.shape[1] - (read - sound) :], new], dim=1)


def _draft(step: ModelStep, states: Tensor, text: list[int], own: list, judge: _Greedy | _Drawn) -> list[int]:
    """Let every module read on, from the states of the tokens that it has not read, and return what each drafts."""
    drafts, start, device = [], own[0].length, states.device
    for index, cache in enumerate(own):
        tokens = (text[start + index + 1 :] + drafts)[: states.shape[1]]
        logits, states = step.draft(index, states, torch.tensor([tokens], device=device), cache)
        drafts.append(judge.draft(logits))
    return drafts


class _Greedy:
    """Writes the likeliest token, so a draft is right or wrong."""

    def draw(self, logits: Tensor) -> int:
        return int(sample(logits, 0.0))

    def draft(self, logits: Tensor) -> int:
        return int(logits.argmax())

    def check(self, logits: Tensor, drafts: list[int]) -> tuple[list[int], tuple[float, ...]]:
        """Return what is written for logits [1 + drafts, vocab], and the odds of the drafts looked at."""
        best = sample(logits, 0.0).tolist()
        right = next((i for i, draft in enumerate(drafts) if draft != best[i]), len(drafts))
        return best[: right + 1], (1.0,) * right + (0.0,) * (right < len(drafts))


class _Drawn:
    """Writes tokens with the model's probabilities; remembers with which ones the last drafts were drawn."""

    def __init__(self, temperature: float, top_p: float, seed: int | None, device: torch.device):
        self._settings, self._generator, self._drafted = (temperature, top_p), torch.Generator(device), []
        self._generator.manual_seed(seed) if seed is not None else self._generator.seed()

    def draw(self, logits: Tensor) -> int:
        return self._pick(self._chances(logits)[0])

    def draft(self, logits: Tensor) -> int:
        self._drafted.append(self._chances(logits)[0])
        return self._pick(self._drafted[-1])

    def check(self, logits: Tensor, drafts: list[int]) -> tuple[list[int], tuple[float, ...]]:
        """As `_Greedy.check`."""
        chances, drafted, odds = self._chances(logits), self._drafted, []
        self._drafted = []
        for i, (draft, q) in enumerate(zip(drafts, drafted, strict=False)):
            odds.append(min(float(chances[i, draft] / q[draft]), 1.0))
            if float(torch.rand((), generator=self._generator, device=q.device, dtype=q.dtype)) >= odds[-1]:
                return [*drafts[:i], self._pick((chances[i] - q).clamp(min=0))], tuple(odds)
        return [*drafts, self._pick(chances[len(drafts)])], tuple(odds)

    def _chances(self, logits: Tensor) -> Tensor:
        weights = chances(logits, *self._settings)
        return weights / weights.sum(dim=-1, keepdim=True)

    def _pick(self, weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=self._generator))
