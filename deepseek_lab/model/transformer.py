"""The whole model: embed, a stack of layers, normalise, score the next token.

Module names are those of the published checkpoints, so `layers.3.self_attn.kv_b_proj` means the same here and there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..attention import RMSNorm
from ..attention.layouts import new_cache
from ..attention.masks import cached_padding, check_hidden, text_positions, uneven
from ..config import ModelConfig
from ..experts import ExpertLayer
from .layer import Layer
from .multi_token import MultiTokenModule
from .recompute import NOTHING, after_norm, checked


class Transformer(nn.Module):
    """A decoder-only language model built from a config: DeepSeek-V3, V2, or a dense Llama or Qwen 2.

    model(tokens [batch, token] int64, caches=None, hidden=None) -> logits [batch, token, vocab]. With caches (one per
    layer, from `new_caches`), tokens continue what the caches hold; one that does not take them raises, and all are
    left as they were. hidden [batch, slot] bool: which slots, cached ones included, are padding between texts of
    different lengths; each text then gets the positions and logits that it has alone.
    `model.recompute = {"norms", "up-projections", "swiglu"}`, or some of them, makes gradients cost less memory and
    more time; gradients and logits stay the same, bit for bit.
    `multi_token` holds the modules that predict further tokens, `config.num_nextn_predict_layers` of them; the model
    itself does not use them. Weights start normal with `config.initializer_range`, the same with modules or without.
    Raises ValueError for tokens of the wrong shape, dtype or range, or a sequence longer than the model's positions.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        _fill(self, config.initializer_range)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        first, count = config.num_hidden_layers, config.num_nextn_predict_layers
        self.multi_token = nn.ModuleList(MultiTokenModule(config, first + k) for k in range(count))
        _fill(self.multi_token, config.initializer_range)
        self.recompute = NOTHING

    def forward(self, tokens: Tensor, caches: list | None = None, hidden: Tensor | None = None) -> Tensor:
        recompute = NOTHING if caches else self.recompute
        return self._run(tokens, caches, hidden, lambda x: after_norm(self.norm, self.lm_head, x, recompute))

    def read(self, tokens: Tensor, caches: list | None = None, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits, and the normalised states [batch, token, hidden] that the head made them from."""
        return self._run(tokens, caches, hidden, lambda x: (self.lm_head(states := self.norm(x)), states))

    def _run(self, tokens: Tensor, caches: list | None, hidden: Tensor | None, finish: Callable):
        """Return what `finish` makes of the last layer's output."""
        start = self._start(caches)
        if hidden is None and caches and tokens.dim() == 2:
            hidden = cached_padding(caches[0], tokens.shape[1])
        positions = self._check(tokens, start, hidden)
        x = self.embed_tokens(tokens)
        try:
            for index, layer in enumerate(self.layers):
                x = layer(x, positions, caches[index] if caches else None, hidden)
            return finish(x)
        except BaseException:  # no layer keeps tokens that another one has not read
            for cache in caches or ():
                cache.truncate(start)
            raise

    @property
    def recompute(self) -> frozenset[str]:
        """What is computed again in the backward pass instead of being kept for it: names of `RECOMPUTABLE`."""
        return self._recompute

    @recompute.setter
    def recompute(self, names: Iterable[str]) -> None:
        self._recompute = checked(names)
        for module in self.modules():
            if isinstance(module, Layer):
                module.recompute = self._recompute

    def new_caches(
        self, batch: int = 1, capacity: int = 64, layout: str | None = None, multi_token: bool = False
    ) -> list:
        """Return one empty cache per layer, on the model's device and in its dtype; layouts: see `new_cache`.

        multi_token: one per prediction module instead.
        """
        like, owners = self.embed_tokens.weight, self.multi_token if multi_token else self.layers
        return [new_cache(self.config, batch, capacity, like.dtype, like.device, layout) for _ in owners]

    def expert_layers(self, multi_token: bool = False) -> list[ExpertLayer]:
        """Return the mixture-of-experts layers, from the first to the last; multi_token: those of the modules too."""
        layers = [*self.layers, *self.multi_token] if multi_token else self.layers
        return [layer.mlp for layer in layers if isinstance(layer.mlp, ExpertLayer)]

    def _start(self, caches: list | None) -> int:
        """Refuse caches that do not belong together; return how many tokens they hold."""
        if caches is None:
            return 0
        if not isinstance(caches, list | tuple) or len(caches) != len(self.layers):
            got = f"{len(caches)} caches" if isinstance(caches, list | tuple) else f"a {type(caches).__name__}"
            raise ValueError(f"model got {got} for {len(self.layers)} layers; use model.new_caches(batch)")
        if len({id(c) for c in caches}) < len(caches) or len({(c.length, *(uneven(c) or ())) for c in caches}) > 1:
            raise ValueError(f"caches hold {[uneven(c) or c.length for c in caches]} tokens, or one serves two layers; "
                             "every layer needs its own, all equally long: make new ones with "
                             "model.new_caches(batch)")  # fmt: skip
        return caches[0].length

    def _check(self, tokens: Tensor, start: int, hidden: Tensor | None = None) -> Tensor:
        """Refuse what the layers would misread; return the positions [token], or [batch, token] with padding."""
        c = self.config
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32) or not tokens.numel():
            raise ValueError(f"model got tokens of shape {tuple(tokens.shape)} and dtype {tokens.dtype}; expected "
                             "[batch, token] of int64 with at least one token")  # fmt: skip
        end = start + tokens.shape[1]
        if hidden is None:
            positions, longest = torch.arange(start, end, device=tokens.device), end
        else:
            check_hidden(hidden, len(tokens), end)
            positions = text_positions(hidden)[:, start:]
            longest = int(positions.max()) + 1
        if longest > c.max_position_embeddings:
            raise ValueError(f"{longest} tokens exceed max_position_embeddings="
                             f"{c.max_position_embeddings}; shorten the text")  # fmt: skip
        low, high = (int(v) for v in tokens.aminmax())
        if low < 0 or high >= c.vocab_size:
            raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary 0..{c.vocab_size - 1}; was "
                             "the text encoded with this model's tokenizer?")  # fmt: skip
        return positions


def _fill(part: nn.Module, deviation: float) -> None:
    """Start matrices normal and biases at zero."""
    for module in part.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
