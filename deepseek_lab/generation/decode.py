"""Read the prompt at once, then write one token after another from the cache."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import Transformer
from .step import decode_step


def generate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stream: bool = False,
    lengths: Sequence[int] | Tensor | None = None,
    align: str = "left",
    layout: str | None = None,
) -> Tensor | Iterator[Tensor]:
    """Continue prompts [batch, token] by `max_new_tokens` and return prompt and continuation, [batch, length] int64.

    temperature 0 always takes the likeliest token; above 0 tokens are drawn from softmax(logits / temperature), after
    cutting the tail so that the kept tokens reach probability `top_p`. The same seed draws the same text.
    stream=True returns an iterator of the new tokens instead, [batch] each, as they are made.
    lengths: how many tokens of each row are its prompt, where rows are filled up to one length; align says where the
    prompt stands in its row, "left" or "right". The filling plays no part, whatever tokens it is; each text becomes
    what it would become alone. The new tokens are the last `max_new_tokens` columns in either case.
    layout: how the cache stores what was read, see `attention.new_cache`; None takes the model's own.
    Raises ValueError where a setting is out of range, the text would outgrow the model's positions, or the model's
    answers are no numbers.
    """
    hidden = _padding(tokens, lengths, align)
    max_new_tokens = check_settings(model, tokens, hidden, max_new_tokens, temperature, top_p)
    caches = model.new_caches(tokens.shape[0], tokens.shape[1] + max_new_tokens, layout)
    draw = _drawer(tokens, temperature, top_p, seed)
    steps = _steps(model, tokens, hidden, max_new_tokens, caches, draw, stream)
    return steps if stream else torch.cat([tokens, torch.stack(list(steps), dim=1)], dim=1)


def first_difference(text: Tensor, other: Tensor) -> list[int | None]:
    """Return for each row of two texts [batch, token] the first place where they differ, None where they are equal."""
    if text.shape != other.shape or text.dim() != 2:
        raise ValueError(f"first_difference got {tuple(text.shape)} and {tuple(other.shape)}; expected two texts "
                         "[batch, token] of one shape")  # fmt: skip
    return [int(row.nonzero()[0]) if row.any() else None for row in text != other]


def _padding(tokens: Tensor, lengths: Sequence[int] | Tensor | None, align: str) -> Tensor | None:
    """Return which tokens are filling: [batch, token] bool, None where all are text."""
    if lengths is None:
        if align != "left":
            raise ValueError(f"align={align!r} without lengths; say how many tokens of each row are real, or every "
                             "token is read as text")  # fmt: skip
        return None
    _check_tokens(tokens)
    batch, longest = tokens.shape
    lengths = torch.as_tensor(lengths, device=tokens.device)
    if lengths.shape != (batch,) or lengths.is_floating_point() or not ((lengths >= 1) & (lengths <= longest)).all():
        raise ValueError(f"lengths={lengths.tolist()} for tokens {tuple(tokens.shape)}; give {batch} whole numbers "
                         f"from 1 to {longest}, how many tokens of each row are real")  # fmt: skip
    if align not in ("left", "right"):
        raise ValueError(f"align={align!r}; choose 'left' (filled up behind the text) or 'right' (in front of it)")
    places = torch.arange(longest, device=tokens.device)
    return places >= lengths[:, None] if align == "left" else places < longest - lengths[:, None]


def _check_tokens(tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"generate got {type(tokens).__name__}; expected a tensor [batch, token]: for a text, encode "
                        "it first: tokenizer.encode(text)[None]")  # fmt: skip
    if tokens.dim() != 2:
        raise ValueError(f"generate got tokens of shape {tuple(tokens.shape)}; expected [batch, token], a row per text")


def check_settings(
    model: Transformer, tokens: Tensor, hidden: Tensor | None, max_new_tokens: int, temperature: float, top_p: float
) -> int:
    """Refuse settings of `generate` that cannot be; return the number of new tokens as a plain int."""
    _check_tokens(tokens)
    try:
        max_new_tokens = operator.index(max_new_tokens)
    except TypeError:
        raise TypeError(f"max_new_tokens={max_new_tokens!r} is no whole number; choose one, such as 64") from None
    prompt = tokens.shape[1] if hidden is None else int((~hidden).sum(1).max())
    if max_new_tokens < 1 or prompt + max_new_tokens > model.config.max_position_embeddings:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after {prompt} prompt tokens; choose at least 1 and at most "
            f"{model.config.max_position_embeddings} together (max_position_embeddings)"
        )
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature}, top_p={top_p}; choose temperature >= 0 and 0 < top_p <= 1")
    return max_new_tokens


def _drawer(tokens: Tensor, temperature: float, top_p: float, seed: int | None) -> Callable[[Tensor], Tensor]:
    """Return the function that chooses the next tokens [batch] from logits [batch, vocab]."""
    generator = None
    if temperature > 0:
        generator = torch.Generator(tokens.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
    return lambda logits: sample(logits, temperature, top_p, generator)


def _steps(
    model, tokens: Tensor, hidden: Tensor | None, count: int, caches: list, draw: Callable, stream: bool
) -> Iterator[Tensor]:
    """Yield `count` new tokens [batch], one after another."""
    rows, last = torch.arange(len(tokens), device=tokens.device), -1
    if hidden is not None:
        tokens = tokens.masked_fill(hidden, 0)  # whatever stands there need not be in the vocabulary
        last = (~hidden * torch.arange(tokens.shape[1], device=tokens.device)).argmax(dim=1)  # of each prompt
        hidden = F.pad(hidden, (0, count))  # no new token is padding
    with torch.inference_mode():
        seen = None if hidden is None else hidden[:, : tokens.shape[1]]
        logits = model(tokens, caches, seen)[rows, last]  # prefill: the whole prompt at once
    step = None
    for written in range(1, count + 1):
        new = draw(logits)
        yield new
        if written < count:
            if step is None or stream:  # whoever reads a stream may change the model between two tokens
                step = decode_step(model, len(new), caches, hidden)
            logits = step(new, caches)


def sample(logits: Tensor, temperature: float, top_p: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Choose one token per row: logits [batch, vocab] -> [batch] int64. Settings as in `generate`.

    Raises ValueError for logits that are no numbers.
    """
    if temperature == 0:
        _finite_top(logits)
        return logits.argmax(dim=-1)
    return torch.multinomial(chances(logits, temperature, top_p), 1, generator=generator).squeeze(-1)


def chances(logits: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Return what `sample` draws from: [batch, vocab] float64, which sums to 1 once it is divided by its sum."""
    # Counted from the top, the likeliest token stays at 0 however small the temperature is.
    below = (logits.double() - _finite_top(logits)) / max(temperature, sys.float_info.min)
    probabilities = below.softmax(dim=-1)
    if top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # probability of all likelier tokens
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    return probabilities


def _finite_top(logits: Tensor) -> Tensor:
    """Return each row's largest logit [batch, 1]; ValueError where there are some that are no numbers."""
    top = logits.amax(dim=-1, keepdim=True)
    if not all(map(math.isfinite, top.flatten().tolist())):
        raise ValueError("the model's logits hold nan or infinity, so no token is the likeliest; some of the model's "
                         "weights are probably nan or huge: load them again, or train with a lower rate")  # fmt: skip
    return top
