"""One decoded token on a CPU: a layer's attention and feed-forward network, each compiled.

Torch spends most of a small model's step on starting some 650 operations. Here a layer is four calls, and every weight
is read where it lies: nothing is packed or copied. What is right is defined by attention/latent.py and experts/.
Compiled functions check no index (with NUMBA_BOUNDSCHECK=1 all but `dot` do): callers check shapes first. What they
call is in this file too, because Numba's cache does not notice a change in another one.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .numba_attention import attend_memory

LANES = 16
ONE = np.float32(1.0)  # a plain 1.0 would turn everything it meets into float64
helper = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
kernel = njit(error_model="numpy", cache=True, no_cfunc_wrapper=True)


@intrinsic
def dot(typing_context, a, start, b):
    """Sum of a.flat[start + k] * b[k] over all of b, both float32 and contiguous.

    A plain loop adds one product after the other, and without fast-math the compiler must keep that order. Here sixteen
    running sums are written out, lane l for k = l, l + 16, ...: one vector register, added up in halves at the end.
    """

    def codegen(context, builder, signature, args):
        a, b = (cgutils.create_struct_proxy(signature.args[i])(context, builder, args[i]) for i in (0, 2))
        size = cgutils.unpack_tuple(builder, b.shape)[0]
        whole = builder.and_(size, ir.Constant(size.type, -LANES))
        vector = ir.VectorType(ir.FloatType(), LANES)
        pointers = builder.gep(a.data, [args[1]]), b.data

        def add_products(total, kind, first, last, step):
            with cgutils.for_range_slice(builder, first, last, ir.Constant(size.type, step)) as (k, _):
                places = [builder.bitcast(builder.gep(p, [k]), kind.as_pointer()) for p in pointers]
                product = builder.fmul(*(builder.load(place, align=4) for place in places))
                builder.store(builder.fadd(builder.load(total), product), total)
            return builder.load(total)

        lanes = cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * LANES))
        sums = add_products(lanes, vector, ir.Constant(size.type, 0), whole, LANES)
        for width in (8, 4, 2, 1):
            halves = [ir.Constant(ir.VectorType(ir.IntType(32), width), [*range(s, s + width)]) for s in (0, width)]
            sums = builder.fadd(*(builder.shuffle_vector(sums, sums, half) for half in halves))
        total = cgutils.alloca_once_value(builder, builder.extract_element(sums, ir.Constant(ir.IntType(32), 0)))
        return add_products(total, ir.FloatType(), whole, size, 1)

    return types.float32(a, types.intp, b), codegen


@helper
def product(weight, x):
    """weight [out, in] times x [in] -> [out]."""
    out = np.empty(weight.shape[0], np.float32)
    for row in range(weight.shape[0]):
        out[row] = dot(weight, row * x.size, x)
    return out


@helper
def weighted_sum(weights, rows, width):
    """Sum of weights[k] * rows[k, :width] -> [width], four rows at a time so that the sum stays in registers."""
    out, whole = np.zeros(width, np.float32), weights.size // 4 * 4
    for k in range(0, whole, 4):
        a, b, c, d = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        for j in range(width):
            out[j] += (a * rows[k, j] + b * rows[k + 1, j]) + (c * rows[k + 2, j] + d * rows[k + 3, j])
    for k in range(whole, weights.size):
        for j in range(width):
            out[j] += weights[k] * rows[k, j]
    return out


@helper
def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight -> [width]."""
    out = np.empty(x.size, np.float32)
    shrink = ONE / np.sqrt(dot(x, 0, x) / np.float32(x.size) + np.float32(eps))
    for j in range(x.size):
        out[j] = x[j] * shrink * weight[j]
    return out


@helper
def rotate_pairs(x, turn):
    """Turn the pairs (x0, x1), (x2, x3), ... by turn [pair, (cos, sin)] -> as x."""
    out = np.empty(x.size, np.float32)
    for pair in range(turn.shape[0]):
        cos, sin = turn[pair, 0], turn[pair, 1]
        real, imaginary = x[2 * pair], x[2 * pair + 1]
        out[2 * pair] = real * cos - imaginary * sin
        out[2 * pair + 1] = real * sin + imaginary * cos
    return out


@helper
def softmax(x, scale):
    """Replace x by exp(scale x) / sum(exp(scale x)); taking the largest off first cannot overflow."""
    largest, total = x[0], np.float32(0.0)
    for value in x:
        largest = max(largest, value)
    for j in range(x.size):
        x[j] = np.exp((x[j] - largest) * scale)
        total += x[j]
    for j in range(x.size):
        x[j] /= total


@helper
def sigmoid(x):
    """Replace x by 1 / (1 + exp(-x))."""
    for j in range(x.size):
        x[j] = ONE / (ONE + np.exp(-x[j]))


@helper
def feed_forward(h, gate, up, down):
    """SwiGLU, down(silu(gate h) * (up h)): gate and up [width, in], down [out, width] -> [out]."""
    g, u = product(gate, h), product(up, h)
    for j in range(g.size):
        g[j] = g[j] / (ONE + np.exp(-g[j])) * u[j]
    return product(down, g)


@helper
def add(x, factor, y):
    """x += factor * y."""
    for j in range(y.size):
        x[j] += factor * y[j]


@helper
def put(x, start, y):
    """x[start : start + len(y)] = y, which takes Numba longer to compile."""
    for j in range(y.size):
        x[start + j] = y[j]


@kernel
def absorb(x, norm, q_a, q_norm, q_b, kv_a, kv_norm, rebuild, eps, turn, memory, length, out):
    """Queries of norm(x) to the memory, whose row `length` is written -> out [batch, head, latent + rope]."""
    (heads, _, latent), width, rope = rebuild.shape, q_b.shape[0] // len(rebuild), 2 * turn.shape[0]
    for b in range(x.shape[0]):
        h = rms_norm(x[b], norm, eps[0])
        query = product(q_b, rms_norm(product(q_a, h), q_norm, eps[1]) if q_a.shape[0] > 0 else h)
        joint = product(kv_a, h)
        put(memory[b, length], 0, rms_norm(joint[:latent], kv_norm, eps[2]))
        put(memory[b, length], latent, rotate_pairs(joint[latent:], turn))
        for head in range(heads):
            own = query[head * width : (head + 1) * width]
            put(out[b, head], 0, weighted_sum(own[: width - rope], rebuild[head], latent))
            put(out[b, head], latent, rotate_pairs(own[width - rope :], turn))


@kernel
def add_values(x, mixed, rebuild, o_proj):
    """x [batch, hidden] += o_proj of all heads' values, rebuilt from the latents mixed [batch, head, latent]."""
    out, values = np.empty(o_proj.shape[1], np.float32), o_proj.shape[1] // len(rebuild)
    for b in range(x.shape[0]):
        for head in range(len(rebuild)):
            put(out, head * values, product(rebuild[head, -values:], mixed[b, head]))
        add(x[b], ONE, product(o_proj, out))


def attention(x, norm, q_a, q_norm, q_b, kv_a, kv_norm, rebuild, o_proj, eps, turn, memory, length, scale):
    """x [batch, hidden] += attention(norm(x)); row `length` of memory [batch, capacity, latent + rope] is written.

    q_a [0, hidden] where the query has no latent, rebuild [head, nope + v, latent]; eps of the three norms.
    """
    q = np.empty((len(x), len(rebuild), memory.shape[2]), np.float32)
    absorb(x, norm, q_a, q_norm, q_b, kv_a, kv_norm, rebuild, eps, turn, memory, length, q)
    add_values(x, attend_memory(q, memory, length + 1, scale, rebuild.shape[2]), rebuild, o_proj)


@kernel
def dense(x, norm, eps, gate, up, down):
    """x [batch, hidden] += down(silu(gate(h)) * up(h)) with h = norm(x)."""
    for b in range(x.shape[0]):
        add(x[b], ONE, feed_forward(rms_norm(x[b], norm, eps), gate, up, down))


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
    """x [batch, hidden] += shared experts + weighted routed experts of h = norm(x); chosen [batch, choice] is written.

    gate [expert, hidden]; bias [expert], for choosing only; no shared experts: their weights are zero rows wide.
    """
    width = down.shape[2]
    for b in range(x.shape[0]):
        h = rms_norm(x[b], norm, eps)
        scores = product(gate, h)
        sigmoid(scores) if is_sigmoid else softmax(scores, ONE)
        biased = scores.copy()
        add(biased, ONE, bias)
        put(chosen[b], 0, choose(biased, chosen.shape[1], groups, kept, best))
        total = np.float32(0.0)
        for expert in chosen[b]:
            total += scores[expert]
        share = np.float32(factor) / (total + np.float32(1e-20)) if normalise else np.float32(factor)
        answer = feed_forward(h, shared_gate, shared_up, shared_down)
        for expert in chosen[b]:
            gate_e, up_e = gate_up[expert, :width], gate_up[expert, width:]  # [width, hidden]
            add(answer, scores[expert] * share, feed_forward(h, gate_e, up_e, down[expert]))
        add(x[b], ONE, answer)


@kernel
def logits(x, norm, eps, head):
    """Scores of the next token: head norm(x), [batch, vocab]."""
    out = np.empty((x.shape[0], head.shape[0]), np.float32)
    for b in range(x.shape[0]):
        put(out[b], 0, product(head, rms_norm(x[b], norm, eps)))
    return out
