"""Tokens copied to the order of their experts, and answers brought back and summed, in torch: what is right.

Slot token * choices + choice belongs to one choice of one token. `order` [slot] int64 lists the slots sorted by expert,
and `back`, its inverse, says where each slot stands among them. Rows are float32 or bfloat16; sums are float32. Every
body rounds each product and adds in the same order, so that all give the same bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 32  # partial sums of a dot product
ROWS = (torch.float32, torch.bfloat16)  # what compiled bodies take; the reference takes float64 and float16 as well


def permute(x: Tensor, order: Tensor, choices: int) -> Tensor:
    """Copy tokens to their slots: x [token, hidden] -> [slot, hidden], row i = x[order[i] // choices].

    Raises ValueError for other shapes, IndexError for slots of no token.
    """
    check_order(x, order, choices)
    return x.index_select(0, order // choices)


def unpermute(answers: Tensor, back: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of each token's answers, the first choice first: answers [slot, hidden] -> [token, hidden].

    weights: [token, choice] float32. Raises ValueError for other shapes, IndexError for slots that are none.
    """
    check_back(answers, back, weights)
    choices = weights.shape[1]
    total = weights.new_zeros(len(weights), answers.shape[1])
    for choice in range(choices):
        total = total + weights[:, choice, None] * answers.index_select(0, back[choice::choices])
    return total.to(answers.dtype)


def unpermute_gradients(gradient: Tensor, answers: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What `unpermute` passes back for gradient [token, hidden]: for answers [slot, hidden], for weights as they are.

    A weight's gradient is a dot product: 32 partial sums, each of every 32nd product, and then halves added to halves.
    """
    check_gradient(gradient, answers, order, weights)
    copies = permute(gradient, order, weights.shape[1]).to(weights.dtype)
    of_answers = (weights.flatten()[order, None] * copies).to(answers.dtype)
    parts = -(-answers.shape[1] // LANES)
    products = F.pad(copies * answers.to(weights.dtype), (0, parts * LANES - answers.shape[1]))
    sums = weights.new_zeros(len(answers), LANES)
    for part in products.unflatten(1, (parts, LANES)).unbind(1):
        sums = sums + part
    while sums.shape[1] > 1:
        left, right = sums.chunk(2, dim=1)
        sums = left + right
    return of_answers, torch.zeros_like(weights).flatten().index_copy(0, order, sums[:, 0]).view_as(weights)


def check_order(x: Tensor, order: Tensor, choices: int) -> None:
    """Raise unless order names slots of the tokens x: compiled bodies check no index."""
    if x.dim() != 2 or order.dim() != 1 or choices < 1:
        raise ValueError(f"got x {tuple(x.shape)}, order {tuple(order.shape)} and {choices} choices; expected "
                         "[token, hidden], [slot] and at least one choice for each token")  # fmt: skip
    check_index("order", order, len(x) * choices)


def check_back(answers: Tensor, back: Tensor, weights: Tensor) -> None:
    """Raise unless back names an answer for every weight."""
    if answers.dim() != 2 or weights.dim() != 2 or back.shape != (weights.numel(),) or weights.shape[1] < 1:
        shapes = [tuple(x.shape) for x in (answers, back, weights)]
        raise ValueError(f"got answers, back, weights of shapes {shapes}; expected [slot, hidden], [token * choice], "
                         "[token, choice]")  # fmt: skip
    check_index("back", back, len(answers))


def check_gradient(gradient: Tensor, answers: Tensor, order: Tensor, weights: Tensor) -> None:
    """Raise unless all four belong to one call of `unpermute`."""
    shapes = [tuple(x.shape) for x in (gradient, answers, order, weights)]
    if (
        [len(shape) for shape in shapes] != [2, 2, 1, 2]
        or shapes[0] != (len(weights), answers.shape[1])
        or len(answers) != len(order)
    ):
        raise ValueError(f"got gradient, answers, order, weights of shapes {shapes}; expected [token, hidden], [slot, "
                         "hidden], [slot], [token, choice]")  # fmt: skip
    check_order(gradient, order, weights.shape[1])


def check_index(name: str, index: Tensor, count: int) -> None:
    """Raise unless an index is int64, from 0 to count - 1."""
    if index.dtype != torch.int64:
        raise TypeError(f"{name} got {index.dtype}; expected torch.int64")
    if len(index):
        least, most = (int(x) for x in index.aminmax())
        if not 0 <= least <= most < count:
            raise IndexError(f"{name} has values from {least} to {most}; there are {count} slots")


def check_rows(*rows: Tensor, weights: Tensor | None = None) -> None:
    """Raise unless compiled bodies know these dtypes: rows of one kind, float32 weights."""
    dtypes = {x.dtype for x in rows}
    if len(dtypes) != 1 or not dtypes <= set(ROWS) or (weights is not None and weights.dtype != torch.float32):
        given = ", ".join(sorted(map(str, dtypes)))
        raise TypeError(f"got rows in {given}" + ("" if weights is None else f" and weights in {weights.dtype}")
                        + "; expected torch.float32 or torch.bfloat16, and weights in torch.float32")  # fmt: skip
