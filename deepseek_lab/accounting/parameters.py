"""How many parameters a model has, and how many of them a token meets."""

from __future__ import annotations

from deepseek_lab.config import ModelConfig

from .ledger import Ledger, Line, grow
from .shapes import model_weights

#: What each count leaves out, by kind of weight. The two "active" words differ between DeepSeek's own papers.
COUNTS: dict[str, tuple[str, ...]] = {
    "total": (),
    "trainable": ("correction bias",),
    "active": (),
    "active_without_embedding": ("embedding",),
    "active_without_embedding_and_head": ("embedding", "tied", "head"),
}
_NOTES = {
    "total": "Resident parameters: all must be stored, whatever a token uses.",
    "trainable": "Without the correction bias, which is moved by the balancing rule and not by a gradient.",
    "active": "Parameters that one token meets, the embedding counted whole.",
    "active_without_embedding": "Parameters that one token multiplies: of the input embedding it only reads one row.",
    "active_without_embedding_and_head": "Parameters of the layers that one token multiplies.",
}


def parameters(config: ModelConfig, count: str = "total", with_mtp: bool = False) -> Ledger:
    """Return the parameters of a model as a ledger, part by part.

    count: "total" (resident), "trainable" (without the correction bias), "active" (what one token meets),
    "active_without_embedding" (V3's own 37B) or "active_without_embedding_and_head".
    with_mtp: also count the multi-token prediction modules, which share embedding and head with the model.

    V3: 671,026,419,200 in total; 36,625,618,432 active without the input embedding. A routed expert counts as active
    `num_experts_per_tok` times out of `n_routed_experts`. Source: DeepSeek-V3 report, sections 2.1 and 4.2.
    Raises ValueError for an unknown count, and for with_mtp on a model without such modules.
    """
    if count not in COUNTS:
        raise ValueError(f"count={count!r} is unknown; choose one of {', '.join(COUNTS)}")
    active = count.startswith("active")
    kept = [w for w in model_weights(config, with_mtp) if w.kind not in COUNTS[count]]
    lines = (
        (w.part, Line(w.name, w.elements(active), "parameters", w.formula(active=active), w.keys, w.source))
        for w in kept
    )
    return grow(f"parameters, {count.replace('_', ' ')}", lines, _NOTES[count])
