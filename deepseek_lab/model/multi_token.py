"""Multi-token prediction: small modules behind the model, each of which looks one token further ahead.

Module k = 1 .. D reads, for token t, what module k - 1 made of it (k = 1: the model's normalised hidden state) and the
embedding of token t + k, and predicts token t + k + 1. Embedding and head are the model's own. While the model is
trained, the modules give every token more to be right about; afterwards they may be dropped, or draft tokens that the
model then checks (`generation.speculate`).

Source: DeepSeek-V3 report (arXiv 2412.19437), section 2.2, equations 21 to 25. The report writes [hidden; embedding];
the released weights, and this file, have [embedding; hidden]. What goes on to the next module has passed
`shared_head.norm`, as the model's own state has passed its final norm: so does the published implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import RMSNorm
from ..config import ModelConfig
from .layer import Layer

if TYPE_CHECKING:
    from .transformer import Transformer


class MultiTokenModule(Layer):
    """One prediction module: a projection of two normalised vectors to one, a layer like the model's own, a norm.

    forward(previous [batch, token, hidden], embedded [batch, token, hidden], positions [token], cache=None) -> states
    [batch, token, hidden] for the head, and for the next module. Slot t of its cache belongs to token t of `previous`.
    """

    def __init__(self, config: ModelConfig, index: int):
        """index: the module's layer number in published files, `num_hidden_layers` for the first."""
        super().__init__(config, index)
        d, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(d, eps=eps), RMSNorm(d, eps=eps)
        self.eh_proj = nn.Linear(2 * d, d, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(d, eps=eps)})

    def forward(self, previous: Tensor, embedded: Tensor, positions: Tensor, cache=None) -> Tensor:
        joint = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(previous)], dim=-1))
        return self.shared_head["norm"](super().forward(joint, positions, cache))


def multi_token_logits(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """Return the logits of every depth for tokens [batch, token]: those of the model, then those of its modules.

    logits[k] [batch, token - k, vocab] predicts at place t token t + 1 + k, and has seen tokens up to t + k: k of the
    tokens that the model itself would still have to predict there are given.
    Raises ValueError for fewer tokens than the last module needs.
    """
    if tokens.dim() == 2 and tokens.shape[1] <= len(model.multi_token):
        raise ValueError(f"multi_token_logits got {tokens.shape[1]} tokens for {len(model.multi_token)} modules; module"
                         f" k needs k + 1 tokens, so give at least {len(model.multi_token) + 1}")  # fmt: skip
    logits, states = model.read(tokens)
    depths = [logits]
    for depth, module in enumerate(model.multi_token, start=1):
        further = tokens[:, depth:]
        positions = torch.arange(further.shape[1], device=tokens.device)
        states = module(states[:, :-1], model.embed_tokens(further), positions)
        depths.append(model.lm_head(states))
    return depths


def multi_token_loss(model: Transformer, batch: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the model's loss and that of each module, in nats, for a batch [batch, token + 1].

    A module's loss is the sum over its predictions by the number of tokens, of which it lacks the last k: equation 24.
    What is trained on is `weighted_loss` of the two.
    """
    main, *further = (
        F.cross_entropy(part.flatten(0, 1).float(), batch[:, 1 + depth :].flatten(), reduction="sum")
        / batch[:, 1:].numel()
        for depth, part in enumerate(multi_token_logits(model, batch[:, :-1]))
    )
    return main, tuple(further)


def weighted_loss(main: Tensor, further: Sequence[Tensor], weight: float) -> Tensor:
    """Return main + weight / D * (the D modules' losses): equation 25. V3: weight 0.3, then 0.1 (section 4.2)."""
    return main + weight / len(further) * sum(further) if further else main
