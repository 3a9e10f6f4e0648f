"""One decoded token on a CPU, or a few: a layer's attention and feed-forward network, each compiled.

Torch spends most of a small model's step on starting some 650 operations. Here a layer is four calls, and every weight
is read where it lies: nothing is packed or copied. What is right is defined by attention/latent.py and experts/.

x [row, hidden]: a row is one token of one text. A row's numbers are the same, bit for bit, whatever stands beside it.

Compiled functions check no index (with NUMBA_BOUNDSCHECK=1 all but the products do): callers check shapes first.
"""

import numpy as np
from numba import njit

from .numba_attention import attend_memory
from .numba_rows import (
    ONE,
    add,
    feed_forward,
    helper,
    multiply,
    product,
    put,
    rms_norm,
    rotate_pairs,
    sigmoid,
    softmax,
    weighted_sum,
)

# Numba compiles anew where this file changes, and does not look at what it imports: so this line has to change too.
IMPORTED = "fee017bb583e89f6"

kernel = njit(error_model="numpy", cache=True, no_cfunc_wrapper=True)


@kernel
def absorb(x, norm, q_a, q_norm, q_b, kv_a, kv_norm, rebuild, eps, turns, memory, length, out):
    """Queries of norm(x) to the memory, which is written from slot `length` on -> out [row, head, latent + rope]."""
    (heads, _, latent), width, batch = rebuild.shape, q_b.shape[0] // len(rebuild), len(memory)
    nope = width - 2 * turns.shape[1]
    h = rms_norm(x, norm, eps[0])
    query = product(q_b, rms_norm(product(q_a, h), q_norm, eps[1]) if q_a.shape[0] > 0 else h)
    joint = product(kv_a, h)
    latents = rms_norm(joint, kv_norm, eps[2])
    for row in range(len(x)):
        slot, turn = memory[row % batch, length + row // batch], turns[row // batch]
        put(slot, 0, latents[row])
        rotate_pairs(joint[row, latent:], turn, slot[latent:])
        for head in range(heads):
            own = query[row, head * width : (head + 1) * width]
            weighted_sum(own[:nope], rebuild[head], out[row, head, :latent])
            rotate_pairs(own[nope:], turn, out[row, head, latent:])


@kernel
def add_values(x, mixed, rebuild, o_proj):
    """x [row, hidden] += o_proj of all heads' values, rebuilt from the latents mixed [row, head, latent]."""
    (heads, rows, latent), values = rebuild.shape, o_proj.shape[1] // len(rebuild)
    out = np.empty((len(x), o_proj.shape[1]), np.float32)
    for head in range(heads):
        start = ((head + 1) * rows - values) * latent
        multiply(rebuild, start, values, mixed, head * latent, heads * latent, len(x), latent,
                 out, head * values, out.shape[1])  # fmt: skip
    answer = product(o_proj, out)
    for row in range(len(x)):
        add(x[row], ONE, answer[row])


def attention(x, norm, q_a, q_norm, q_b, kv_a, kv_norm, rebuild, o_proj, eps, turns, memory, length, scale, first=0):
    """x [row, hidden] += attention(norm(x)); memory [batch, capacity, latent + rope] is written from `length` on.

    Rows: the next token of every text, or the next few of a single one, each of which sees its text up to itself; turns
    [token, pair, (cos, sin)] of their positions. q_a [0, hidden] where the query has no latent, rebuild [head,
    nope + v, latent]; eps of the three norms. Rows before `first` are only written into the memory.
    """
    q = np.empty((len(x), len(rebuild), memory.shape[2]), np.float32)
    absorb(x, norm, q_a, q_norm, q_b, kv_a, kv_norm, rebuild, eps, turns, memory, length, q)
    lengths = np.arange(length + 1, length + 1 + len(turns)) if len(memory) == 1 else np.full(len(x), length + 1)
    mixed = attend_memory(q[first:], memory, lengths[first:], scale, rebuild.shape[2])
    add_values(x[first:], mixed, rebuild, o_proj)


@kernel
def dense(x, norm, eps, gate, up, down):
    """x [row, hidden] += down(silu(gate(h)) * up(h)) with h = norm(x)."""
    answer = feed_forward(rms_norm(x, norm, eps), gate, up, down)
    for row in range(len(x)):
        add(x[row], ONE, answer[row])


@helper
def take_largest(values, count):
    """Indices of the `count` largest (or not a number), in rising order; ties: the lower. Those values become -inf."""
    indices = np.empty(count, np.int64)
    for i in range(count):
        best = 0
        for j in range(values.size):
            best = j if values[j] > values[best] or np.isnan(values[j]) else best
        while i > 0 and indices[i - 1] > best:
            indices[i] = indices[i - 1]
            i -= 1
        indices[i], values[best] = best, -np.inf
    return indices


@helper
def choose(scores, count, groups, kept, best):
    """The experts [count] that scores [expert] select, from the `kept` groups with the highest sum of `best` scores."""
    if kept < groups:
        size, totals = scores.size // groups, np.zeros(groups, np.float32)
        for group in range(groups):
            members = scores[group * size : (group + 1) * size]
            for index in take_largest(members.copy(), best):
                totals[group] += members[index]
        take_largest(totals, kept)  # the kept groups are at -inf now, and the others leave
        for expert in range(scores.size):
            if totals[expert // size] > -np.inf:
                scores[expert] = -np.inf
    return take_largest(scores, count)


@kernel
def experts(x, norm, eps, gate, bias, gate_up, down, shared_gate, shared_up, shared_down, chosen,
            is_sigmoid, groups, kept, best, normalise, factor):  # fmt: skip
    """x [row, hidden] += shared experts + weighted routed experts of h = norm(x); chosen [row, choice] is written.

    gate [expert, hidden]; bias [expert], for choosing only; no shared experts: their weights are zero rows wide.
    """
    width, h = down.shape[2], rms_norm(x, norm, eps)
    scores, answer = product(gate, h), feed_forward(h, shared_gate, shared_up, shared_down)
    for row in range(len(x)):
        own = scores[row]
        sigmoid(own) if is_sigmoid else softmax(own, ONE)
        biased = own.copy()
        add(biased, ONE, bias)
        put(chosen[row], 0, choose(biased, chosen.shape[1], groups, kept, best))
        total = np.float32(0.0)
        for expert in chosen[row]:
            total += own[expert]
        share = np.float32(factor) / (total + np.float32(1e-20)) if normalise else np.float32(factor)
        for expert in chosen[row]:
            own[expert] *= share
    readers, read = np.empty(len(x), np.int64), np.empty_like(h)
    for expert in range(len(down)):  # its weights are read once for all rows that chose it
        count = 0
        for row in range(len(x)):
            for choice in chosen[row]:
                if choice == expert:
                    readers[count] = row
                    put(read[count], 0, h[row])
                    count += 1
        if count > 0:
            gate_e, up_e = gate_up[expert, :width], gate_up[expert, width:]  # [width, hidden]
            answers = feed_forward(read[:count], gate_e, up_e, down[expert])
            for i in range(count):
                add(answer[readers[i]], scores[readers[i], expert], answers[i])
    for row in range(len(x)):
        add(x[row], ONE, answer[row])


@kernel
def join(previous, embedded, hnorm, hnorm_eps, enorm, enorm_eps, eh_proj):
    """What a prediction module reads: eh_proj of [norm(embedded), norm(previous)] -> [row, hidden]."""
    both, width = np.empty((len(previous), eh_proj.shape[1]), np.float32), enorm.size
    first, second = rms_norm(embedded, enorm, enorm_eps), rms_norm(previous, hnorm, hnorm_eps)
    for row in range(len(previous)):
        put(both[row], 0, first[row])
        put(both[row], width, second[row])
    return product(eh_proj, both)


@kernel
def logits(x, norm, eps, head):
    """Scores of the next token, head norm(x): [row, vocab], and norm(x) itself [row, hidden]."""
    h = rms_norm(x, norm, eps)
    return product(head, h), h
