"""Small pieces of the compiled decode step: products of a matrix with one row or a few, norms, rotations, SwiGLU.

A weight is read once for two rows, and each row is summed up as it would be alone: its numbers do not depend, in any
bit, on what stands beside it.

Compiled functions check no index (with NUMBA_BOUNDSCHECK=1 all but `block` do): callers check shapes first. Numba's
cache does not notice a change in this file; the kernels in numba_decode.py, which call these functions, name its hash.
"""

from functools import partial

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .numba_attention import exp

LANES = 16
FLOAT, WORD = ir.FloatType(), ir.IntType(32)
VECTOR = ir.VectorType(FLOAT, LANES)
ONE = np.float32(1.0)  # a plain 1.0 would turn everything it meets into float64

helper = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


def block(many: int, rows: int):
    """Return the intrinsic out[r, j] = sum over k < size of weight[j, k] x[r, k], for j < many and r < rows.

    The matrices lie in flat arrays from their starts on; x_step and out_step lead from one row to the next. A plain
    loop adds one product after the other, and without fast-math the compiler must keep that order. Here each sum is
    sixteen running sums, lane l for k = l, l + 16, ...: one vector register, added up in halves at the end. Products
    are fused with sums where the processor can.
    """

    @intrinsic
    def multiply_block(typing_context, weight, start, x, x_start, x_step, size, out, out_start, out_step):
        n = types.intp
        kinds = weight, n, x, n, n, n, out, n, n

        def codegen(context, builder, signature, args):
            weight, x, out = (cgutils.create_struct_proxy(kinds[i])(context, builder, args[i]).data for i in (0, 2, 6))
            size, place = args[5], partial(row_place, builder)
            left = [place(weight, args[1], size, j) for j in range(many)]
            right = [place(x, *args[3:5], r) for r in range(rows)]
            whole, zeros = builder.and_(size, ir.Constant(size.type, -LANES)), ir.Constant(VECTOR, [0.0] * LANES)
            lanes = [cgutils.alloca_once_value(builder, zeros) for _ in range(many * rows)]
            ahead = [place(weight, args[1], size, many + j) for j in range(many)] if many > 1 else []
            add_products(builder, lanes, left, right, VECTOR, ir.Constant(size.type, 0), whole, ahead)
            sums = [cgutils.alloca_once_value(builder, each) for each in totals(builder, [*map(builder.load, lanes)])]
            add_products(builder, sums, left, right, FLOAT, whole, size)
            for i, each in enumerate(sums):
                to = place(out, *args[7:], i // many)
                builder.store(builder.load(each), builder.gep(to, [ir.Constant(size.type, i % many)]))
            return context.get_dummy_value()

        return types.void(*kinds), codegen

    return multiply_block


def row_place(builder, array, start, step, row: int):
    return builder.gep(array, [builder.add(start, builder.mul(step, ir.Constant(step.type, row)))])


def add_products(builder, sums, left, right, kind, first, last, ahead=()) -> None:
    """Write the loop that adds left[j][k] right[r][k] to sums[r * len(left) + j], for k from first to last.

    ahead: what is read after this loop, and is called into the cache beside it.
    """
    name, step = ("llvm.fmuladd.f32", 1) if kind is FLOAT else (f"llvm.fmuladd.v{LANES}f32", LANES)
    fused = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    with cgutils.for_range_slice(builder, first, last, ir.Constant(first.type, step)) as (k, _):
        places = [builder.bitcast(builder.gep(start, [k]), kind.as_pointer()) for start in left + right]
        for start in ahead:
            prefetch(builder, builder.gep(start, [k]))
        numbers = [builder.load(place, align=4) for place in places]
        for i, each in enumerate(sums):
            pair = numbers[i % len(left)], numbers[len(left) + i // len(left)]
            builder.store(builder.call(fused, [*pair, builder.load(each)]), each)


def prefetch(builder, place) -> None:
    """Ask for what lies there, which may be behind the end of its array."""
    kind = ir.FunctionType(ir.VoidType(), [place.type, WORD, WORD, WORD])
    how = [ir.Constant(WORD, number) for number in (0, 3, 1)]  # to read it, into every cache, as data
    builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [place, *how])


def totals(builder, vectors) -> list:
    """The sum of each vector's lanes: l + 8 is added to l, then l + 4, l + 2, l + 1.

    Two vectors of which halves are left fit into one, so that the next addition serves both.
    """
    half, count = LANES // 2, len(vectors)
    while half:
        low = [lane for group in range(0, 2 * LANES, 2 * half) for lane in range(group, group + half)]
        picks = [ir.Constant(ir.VectorType(WORD, LANES), [lane + up for lane in low]) for up in (0, half)]
        pairs = [(a, vectors[min(i + 1, len(vectors) - 1)]) for i, a in enumerate(vectors) if i % 2 == 0]
        vectors = [builder.fadd(*(builder.shuffle_vector(*pair, pick) for pick in picks)) for pair in pairs]
        half //= 2
    return [builder.extract_element(vectors[0], ir.Constant(WORD, i)) for i in range(count)]


single, four, four_by_two = block(1, 1), block(4, 1), block(4, 2)


@helper
def multiply(weight, start, many, x, x_start, x_step, rows, size, out, out_start, out_step):
    """As `block`, for any number of rows: four of the matrix are read once for two of x."""
    for j in range(0, many - many % 4, 4):
        for r in range(0, rows - rows % 2, 2):
            four_by_two(weight, start + j * size, x, x_start + r * x_step, x_step, size,
                        out, out_start + r * out_step + j, out_step)  # fmt: skip
        if rows % 2:
            r = rows - 1
            four(weight, start + j * size, x, x_start + r * x_step, 0, size, out, out_start + r * out_step + j, 0)
    for j in range(many - many % 4, many):
        for r in range(rows):
            single(weight, start + j * size, x, x_start + r * x_step, 0, size, out, out_start + r * out_step + j, 0)


@helper
def product(weight, x):
    """weight [out, in] times each row of x [row, in] -> [row, out]."""
    many, size = weight.shape
    out = np.empty((x.shape[0], many), np.float32)
    multiply(weight, 0, many, x, 0, size, x.shape[0], size, out, 0, many)
    return out


@helper
def weighted_sum(weights, rows, out):
    """out[:] = sum of weights[k] * rows[k, : len(out)], four rows at a time so that the sum stays in registers."""
    width, whole = out.size, weights.size // 4 * 4
    out[:] = 0
    for k in range(0, whole, 4):
        a, b, c, d = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        for j in range(width):
            out[j] += (a * rows[k, j] + b * rows[k + 1, j]) + (c * rows[k + 2, j] + d * rows[k + 3, j])
    for k in range(whole, weights.size):
        for j in range(width):
            out[j] += weights[k] * rows[k, j]


@helper
def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight of the first numbers of each row of x -> [row, width], as many as weights."""
    width, square, out = weight.size, np.empty(1, np.float32), np.empty((x.shape[0], weight.size), np.float32)
    for row in range(x.shape[0]):
        start = row * x.shape[1]
        single(x, start, x, start, 0, width, square, 0, 0)
        shrink = ONE / np.sqrt(square[0] / np.float32(width) + np.float32(eps))
        for j in range(width):
            out[row, j] = x[row, j] * shrink * weight[j]
    return out


@helper
def rotate_pairs(x, turn, out):
    """out[:] = x with its pairs (x0, x1), (x2, x3), ... turned by turn [pair, (cos, sin)]."""
    for pair in range(turn.shape[0]):
        cos, sin = turn[pair, 0], turn[pair, 1]
        real, imaginary = x[2 * pair], x[2 * pair + 1]
        out[2 * pair] = real * cos - imaginary * sin
        out[2 * pair + 1] = real * sin + imaginary * cos


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
    """SwiGLU, down(silu(gate h) * (up h)): h [row, in], gate and up [width, in], down [out, width] -> [row, out]."""
    g, u = product(gate, h), product(up, h)
    for row in range(g.shape[0]):
        for j in range(g.shape[1]):
            small = exp(-abs(g[row, j]))
            g[row, j] *= (ONE if g[row, j] >= 0 else small) / (ONE + small) * u[row, j]
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
