"""Which tokens a token may look at, and where in its text it stands.

A cache has slots, one after another for the whole batch. Texts of different lengths share them with the help of
padding: `hidden` [batch, slot] says which slots hold no token of a text. Nobody looks at those, and the positions of a
text count its own tokens only, so it is computed as it would be alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_mask(x: Tensor, total: int, hidden: Tensor | None = None) -> dict:
    """What `scaled_dot_product_attention` must be told so that x, the last of `total` tokens, looks back only.

    With hidden [batch, total] nobody looks at hidden slots either; padding itself sees its own slot, since a softmax
    over nothing is not a number. Raises ValueError where `hidden` does not fit.
    """
    tokens = x.shape[1]
    if hidden is not None:
        check_hidden(hidden, len(x), total)
        past = x.new_ones(tokens, total, dtype=torch.bool).tril(total - tokens)
        return {"attn_mask": (past & ~hidden[:, None] | past.triu(total - tokens))[:, None]}  # [batch, 1, token, slot]
    if tokens == total:
        return {"is_causal": True}
    if tokens == 1:
        return {}
    return {"attn_mask": x.new_ones(tokens, total, dtype=torch.bool).tril(total - tokens)}


def text_positions(hidden: Tensor) -> Tensor:
    """Return where in its own text each slot stands: hidden [batch, slot] -> [batch, slot] int64.

    Padding gets the place of the token before it, 0 at the start.
    """
    return ((~hidden).cumsum(dim=1) - 1).clamp(min=0)


def uneven(cache) -> list[int] | None:
    """Return the lengths of a paged cache's sequences where they differ, None for any other cache."""
    lengths = getattr(cache, "lengths", ())
    return lengths if len(set(lengths)) > 1 else None


def cached_padding(cache, tokens: int) -> Tensor | None:
    """Return the padding in front of a paged cache's shorter sequences, [batch, slot] with `tokens` new slots.

    None where all sequences are equally long.
    """
    return F.pad(cache.hidden(), (0, tokens)) if uneven(cache) else None


def check_hidden(hidden: Tensor, batch: int, slots: int) -> None:
    """Raise ValueError unless `hidden` is a boolean for every slot, old and new, of every text."""
    if not isinstance(hidden, Tensor) or hidden.dtype != torch.bool or hidden.shape != (batch, slots):
        got = f"{tuple(hidden.shape)} of {hidden.dtype}" if isinstance(hidden, Tensor) else f"a {type(hidden).__name__}"
        raise ValueError(f"hidden is {got}; expected a tensor [batch, slot] = "
                         f"{(batch, slots)} of torch.bool, True for every slot, cached or new, that is "
                         "padding")  # fmt: skip


def check_positions(x: Tensor, positions: Tensor, cache=None, hidden: Tensor | None = None) -> None:
    """Raise ValueError unless positions [token] or [batch, token] go on from what the cache holds."""
    if positions.shape not in ((x.shape[1],), tuple(x.shape[:2])):
        raise ValueError(f"positions have shape {tuple(positions.shape)} for x of {tuple(x.shape)}; expected [token] = "
                         f"{(x.shape[1],)}, or [batch, token] = {tuple(x.shape[:2])}")  # fmt: skip
    if cache is None:
        return
    length = cache.length
    if uneven(cache) and (hidden is None or bool((cache.hidden() & ~hidden[:, :length]).any())):
        raise ValueError(f"the cache holds sequences of {cache.lengths} tokens; pass hidden= (cached_padding), True "
                         "for the empty slots in front of shorter ones, or these would be read")  # fmt: skip
    if hidden is None and positions.numel() == 1:  # every decoded token comes here, so it costs no tensor operation
        back = int(positions) < length
    else:
        least = length
        if hidden is not None:  # padding repeats the position of the token before it
            least = (~hidden[:, :length]).sum(dim=1, keepdim=True) - hidden[:, length:].long()
        back = bool((positions < least).any() or (positions.diff() < 0).any())
    if back:
        raise ValueError(f"positions {positions.tolist()} go back behind the {length} tokens that the cache holds, or "
                         "behind each other; a text goes on where it ended: cache.truncate(length) first")  # fmt: skip
