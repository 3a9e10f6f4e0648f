"""Where experts live, and what a token's way to them costs.

A busy expert can have several copies. `place` makes the copies and spreads them over GPUs, so that every GPU has the
same number of them and nearly the same work: DeepSeek's published greedy, twice "the heaviest that is left goes where
there is least". `traffic` counts the copies of tokens that leave for other nodes and the bytes they take.

Sources: EPLB repository (deepseek-ai/EPLB, eplb.py); DeepSeek-V3 report, sections 3.2.2 and 3.3.3 (FP8 out, BF16 back).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ModelConfig
from ..precision.scaling import BLOCK
from .trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class Placement:
    """Which expert every slot holds. Slots are numbered GPU by GPU, GPUs node by node.

    Two slots of one GPU may hold the same expert: the greedy does not look.
    """

    experts: Tensor  # [layer, slot] int64, the expert in each slot
    copies: Tensor  # [layer, expert] int64, at least 1
    slots_of: Tensor  # [layer, expert, most] int64, an expert's slots in ascending order, -1 where it has fewer
    gpu_load: Tensor  # [layer, gpu] float64, where the copies of an expert share its load equally
    policy: str  # "hierarchical": the experts of a group stay on one node; "global": nodes and groups are ignored

    @property
    def max_over_mean(self) -> Tensor:
        """How many times the mean load the busiest GPU has: [layer], 1 is perfect. NaN where nothing was routed."""
        return self.gpu_load.amax(1) / self.gpu_load.mean(1)


@dataclass(frozen=True, eq=False)
class Traffic:
    """Copies of tokens that travel for one layer: one to every node on which a token has experts, and one answer back.

    A node counts even where the token lives there already; that copy needs no network. Inside a node a copy goes on to
    each of its experts, and their answers are added up before they leave.
    """

    slots: Tensor  # [token, node] int64, how many of a token's experts live on each node
    copy_bytes: int  # of one copy on its way out: FP8 codes and one FP32 scale for 128 of them
    answer_bytes: int  # of one answer on its way back: BF16

    @property
    def sent(self) -> Tensor:
        """[token, node] bool."""
        return self.slots > 0

    @property
    def nodes_touched(self) -> Tensor:
        """[token] int64."""
        return self.sent.sum(1)

    @property
    def tokens(self) -> Tensor:
        """How many tokens are sent to each node: [node] int64."""
        return self.sent.sum(0)

    @property
    def dispatched(self) -> Tensor:
        """Bytes of each token's copies on their way out: [token] int64."""
        return self.nodes_touched * self.copy_bytes

    @property
    def combined(self) -> Tensor:
        """Bytes of the answers on their way back: [token] int64."""
        return self.nodes_touched * self.answer_bytes

    @property
    def total(self) -> int:
        """Bytes out and back of all tokens."""
        return (self.dispatched + self.combined).sum().item()


@dataclass(frozen=True, eq=False)
class LayerTraffic:
    """The traffic of one layer of a traced text, as it was and as it would be if all groups were open."""

    layer: int  # index in the model
    limit: int  # nodes that a token may touch
    limited: Traffic  # with the group limit, as it was
    free: Traffic  # without

    @property
    def saved(self) -> float:
        """The share of the free traffic's bytes that the limit saves; 0 for no tokens."""
        return 1 - self.limited.total / self.free.total if self.free.total else 0.0


def balanced_packing(weight: Tensor, packs: int) -> Tensor:
    """Return which items each pack holds: [pack, item in pack] int64, in the order in which they were put in.

    weight: [item]. The heaviest item that is left goes into the lightest pack that has room, the first of equals. Where
    a pack holds one item, item i goes into pack i. ValueError unless every pack can hold the same number.
    """
    _check_whole(packs=packs)
    if weight.dim() != 1 or len(weight) % packs:
        raise ValueError(f"balanced_packing got {packs} packs for items {tuple(weight.shape)}; expected [item], and a "
                         "number of items that the packs divide")  # fmt: skip
    room = len(weight) // packs
    if room == 1:
        return torch.arange(packs)[:, None]
    weights, held, totals = weight.tolist(), [[] for _ in range(packs)], [0.0] * packs
    for item in weight.argsort(descending=True, stable=True).tolist():
        pack = min((p for p in range(packs) if len(held[p]) < room), key=totals.__getitem__)
        held[pack].append(item)
        totals[pack] += weights[item]
    return torch.tensor(held)


def replicate_experts(weight: Tensor, replicas: int) -> Tensor:
    """Return which expert each of the replicas is: [replica] int64, first every expert once, then the further copies.

    weight: [expert]. Each further copy is of the expert whose copies now carry most, the first of equals.
    ValueError for fewer replicas than experts.
    """
    _check_whole(replicas=replicas)
    if weight.dim() != 1 or not 0 < len(weight) <= replicas:
        raise ValueError(f"replicate_experts got {replicas} replicas for experts {tuple(weight.shape)}; expected "
                         "[expert] and at least one replica of each")  # fmt: skip
    copies, further = torch.ones(len(weight), dtype=torch.int64), []
    while len(further) < replicas - len(weight):
        further.append((weight / copies).argmax().item())
        copies[further[-1]] += 1
    return torch.cat([torch.arange(len(weight)), torch.tensor(further, dtype=torch.int64)])


def place(load: Tensor, replicas: int, groups: int, nodes: int, gpus: int) -> Placement:
    """Return where the replicas of each layer's experts go.

    load: [layer, expert], the tokens that each expert received. replicas: slots in all, as many on one GPU as on any
    other. groups: of neighbouring experts. Where the nodes divide the groups, a group stays on one node
    ("hierarchical"); where they do not, groups and nodes are ignored ("global").
    ValueError for sizes that do not divide, for fewer replicas than experts and for a load that is negative or NaN.
    """
    load, hierarchical = _check_place(load, replicas, groups, nodes, gpus), groups % nodes == 0
    if not hierarchical:
        groups = nodes = 1
    experts = torch.stack([_place_layer(row, replicas, groups, nodes, gpus) for row in load])
    copies = torch.zeros(load.shape, dtype=torch.int64).scatter_add_(1, experts, torch.ones_like(experts))
    share = (load / copies).gather(1, experts)
    slots_of = torch.full((*load.shape, copies.max().item()), -1)
    for row, holds in zip(slots_of, experts, strict=True):
        for expert, slots in enumerate(row):
            mine = (holds == expert).nonzero().flatten()
            slots[: len(mine)] = mine
    policy = "hierarchical" if hierarchical else "global"
    return Placement(experts, copies, slots_of, share.unflatten(1, (gpus, -1)).sum(-1), policy)


def _place_layer(load: Tensor, replicas: int, groups: int, nodes: int, gpus: int) -> Tensor:
    """One layer: groups to nodes; on each node copies of the busiest experts; copies to the GPUs of the node."""
    members = torch.arange(len(load)).unflatten(0, (groups, -1))
    out = []
    for held in balanced_packing(load.unflatten(0, (groups, -1)).sum(1), nodes):
        experts = members[held].flatten()
        slots = replicate_experts(load[experts], replicas // nodes)
        copies = slots.bincount(minlength=len(experts))
        share = (load[experts] / copies)[slots]
        out.append(experts[slots[balanced_packing(share, gpus // nodes).flatten()]])
    return torch.cat(out)


def traffic(experts: Tensor, config: ModelConfig, nodes: int | None = None) -> Traffic:
    """Return what travels when tokens have chosen these experts.

    experts: [token, choice] int64. nodes: over how many the experts are spread in order, `config.n_group` unless told.
    ValueError for nodes that do not divide the experts, for other shapes and for experts that the model does not have.
    """
    count, nodes = config.n_routed_experts, config.n_group if nodes is None else nodes
    _check_whole(nodes=nodes)
    if not count or count % nodes:
        raise ValueError(f"nodes={nodes} does not divide n_routed_experts={count}; every node holds as many experts")
    if experts.dim() != 2 or experts.dtype != torch.int64:
        raise ValueError(f"traffic got experts {experts.dtype} {tuple(experts.shape)}; expected int64 [token, choice]")
    if experts.numel() and not 0 <= experts.min() <= experts.max() < count:
        raise ValueError(f"traffic got experts {experts.min()} to {experts.max()}; this model has 0 to {count - 1}")
    slots = torch.zeros(len(experts), nodes, dtype=torch.int64)
    slots.scatter_add_(1, (experts // (count // nodes)).cpu(), torch.ones(experts.shape, dtype=torch.int64))
    codes, scales = config.hidden_size, -(-config.hidden_size // BLOCK)
    return Traffic(slots, codes + 4 * scales, 2 * config.hidden_size)


def trace_traffic(trace: RoutingTrace, config: ModelConfig) -> tuple[LayerTraffic, ...]:
    """Return the traffic of every layer of a trace, with the group limit and without, a group on each node."""
    limit = config.n_group if config.topk_method == "greedy" else config.topk_group
    return tuple(
        LayerTraffic(at.layer, limit, traffic(at.chosen, config), traffic(at.without_groups, config))
        for at in trace.layers
    )


def _check_whole(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}; choose a whole number >= 1")


def _check_place(load: Tensor, replicas: int, groups: int, nodes: int, gpus: int) -> Tensor:
    """Return the loads as float64 on the CPU: counts far above 2^24 keep their last digits."""
    _check_whole(replicas=replicas, groups=groups, nodes=nodes, gpus=gpus)
    if load.dim() != 2 or not load.numel():
        raise ValueError(
            f"place got loads of shape {tuple(load.shape)}; expected [layer, expert]: load[None] for a layer"
        )
    load, count = load.detach().double().cpu(), load.shape[1]
    if not load.isfinite().all() or load.min() < 0:
        raise ValueError(
            "place got a load that is negative, infinite or NaN; give the tokens that each expert received"
        )
    if replicas < count:
        raise ValueError(f"replicas={replicas} for {count} experts; every expert needs at least one")
    divisions = [("groups", groups, "experts", count), ("gpus", gpus, "replicas", replicas)]
    if groups % nodes == 0:
        divisions.append(("nodes", nodes, "gpus", gpus))
    for name, parts, of, whole in divisions:
        if whole % parts:
            raise ValueError(f"{name}={parts} does not divide {of}={whole}; choose numbers that share out evenly")
    return load
