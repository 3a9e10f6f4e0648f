"""Read the prompt at once, then write one token after another from the cache."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterator

import torch
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
) -> Tensor | Iterator[Tensor]:
    """Continue a prompt [batch, token] by `max_new_tokens` and return prompt and continuation, [batch, length] int64.

    temperature 0 always takes the likeliest token; above 0 tokens are drawn from softmax(logits / temperature), after
    cutting the tail so that the kept tokens reach probability `top_p`. The same seed draws the same text.
    stream=True returns an iterator of the new tokens instead, [batch] each, as they are made.
    Raises ValueError where a setting is out of range, the text would outgrow the model's positions, or the model's
    answers are no numbers.
    """
    max_new_tokens = _check(model, tokens, max_new_tokens, temperature, top_p)
    steps = _steps(model, tokens, max_new_tokens, temperature, top_p, seed, stream)
    return steps if stream else torch.cat([tokens, torch.stack(list(steps), dim=1)], dim=1)


def _check(model: Transformer, tokens: Tensor, max_new_tokens: int, temperature: float, top_p: float) -> int:
    """Refuse settings of `generate` that cannot be; return the number of new tokens as a plain int."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"generate got {type(tokens).__name__}; expected a tensor [batch, token]: for a text, encode "
                        "it first: tokenizer.encode(text)[None]")  # fmt: skip
    try:
        max_new_tokens = operator.index(max_new_tokens)
    except TypeError:
        raise TypeError(f"max_new_tokens={max_new_tokens!r} is no whole number; choose one, such as 64") from None
    if tokens.dim() != 2:
        raise ValueError(f"generate got tokens of shape {tuple(tokens.shape)}; expected [batch, token], a row per text")
    longest = tokens.shape[-1] + max_new_tokens
    if max_new_tokens < 1 or longest > model.config.max_position_embeddings:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after {tokens.shape[-1]} prompt tokens; choose at least 1 and at most "
            f"{model.config.max_position_embeddings} together (max_position_embeddings)"
        )
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature}, top_p={top_p}; choose temperature >= 0 and 0 < top_p <= 1")
    return max_new_tokens


def _steps(
    model, tokens: Tensor, count: int, temperature: float, top_p: float, seed: int | None, stream: bool
) -> Iterator[Tensor]:
    generator = None
    if temperature > 0:
        generator = torch.Generator(tokens.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
    caches = model.new_caches(batch=tokens.shape[0], capacity=tokens.shape[1] + count)
    with torch.inference_mode():
        logits = model(tokens, caches)[:, -1]  # prefill: the whole prompt at once
    step = None
    for written in range(1, count + 1):
        new = sample(logits, temperature, top_p, generator)
        yield new
        if written < count:
            if step is None or stream:  # whoever reads a stream may change the model between two tokens
                step = decode_step(model, batch=len(new))
            logits = step(new, caches)


def sample(logits: Tensor, temperature: float, top_p: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Choose one token per row: logits [batch, vocab] -> [batch] int64. Settings as in `generate`.

    Raises ValueError for logits that are no numbers.
    """
    top = logits.amax(dim=-1, keepdim=True)
    if not all(map(math.isfinite, top.flatten().tolist())):
        raise ValueError("the model's logits hold nan or infinity, so no token is the likeliest; some of the model's "
                         "weights are probably nan or huge: load them again, or train with a lower rate")  # fmt: skip
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Counted from the top, the likeliest token stays at 0 however small the temperature is.
    below = (logits.double() - top) / max(temperature, sys.float_info.min)
    probabilities = below.softmax(dim=-1)
    if top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # probability of all likelier tokens
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
