"""`python -m deepseek_lab.kernels` compiles every kernel once; later processes read them from Numba's cache."""

import time

import numpy as np
import torch

from .dispatch import active, body, body_for


def compile_decoding(kernels) -> None:
    """Call each kernel on the smallest arrays of the types that a model gives it: [batch 1], every width 2."""
    weight, stack = (np.ones((2,) * axes, np.float32) for axes in (2, 3))
    x, norm, memory = (np.ones(shape, np.float32) for shape in [(1, 2), (2,), (1, 1, 4)])
    kernels.attention(x, norm, weight, norm, np.ones((4, 2), np.float32), np.ones((4, 2), np.float32), norm,
                      np.ones((1, 4, 2), np.float32), weight, np.ones(3, np.float32), np.ones((1, 1, 2), np.float32),
                      memory, 0, 1.0)  # fmt: skip
    kernels.dense(x, norm, 1e-6, weight, weight, weight)
    kernels.experts(x, norm, 1e-6, weight, norm, np.ones((2, 4, 2), np.float32), stack, weight, weight, weight,
                    np.zeros((1, 1), np.int64), True, 1, 1, 1, True, 1.0)  # fmt: skip
    kernels.join(x, x, norm, 1e-6, norm, 1e-6, np.ones((2, 4), np.float32))
    kernels.logits(x, norm, 1e-6, weight)


def compile_fp8(kernels) -> None:
    """Call each kernel of casts, scaling and products on a single value."""
    numbers = kernels.Numbers(*(kind(1) for kind in kernels.Numbers.__annotations__.values()))  # of no format at all
    x, scales, one = np.ones(1, np.float32), np.ones((1, 1), np.float32), np.float32(1)
    for codes in (np.ones(1, np.int32), np.ones(1, np.uint8)):
        kernels.encode_all(x, numbers, codes)
        kernels.decode_all(codes, numbers, x)
    kernels.quantize_tiles(x, (1, 1), (1, 1), numbers, one, True, codes, scales)
    kernels.quantize_columns(x, (1, 1), 1, numbers, one, True, codes, scales)
    kernels.dequantize_all(codes, scales, (1, 1), (1, 1), numbers, x)
    codes, scales = torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1)
    kernels.product(codes, codes, scales, scales, 32)


def compile_attention(kernels) -> None:
    """Call the kernel of attention once for each way of keeping a memory."""
    q, memory, scales = torch.ones(1, 1, 2), torch.ones(1, 1, 2, dtype=torch.bfloat16), torch.ones(1, 1, 1)
    for joint in (memory, memory.float()):
        kernels.decode_attention(q, joint, 1, 1.0, 1)
    kernels.decode_attention_fp8(q, memory[..., :1].to(torch.float8_e4m3fn), scales, memory[..., 1:], 1, 1.0)


def compile_dispatch(kernels) -> None:
    """Call the kernels that send rows to their experts and back once for each dtype of rows."""
    index, weights = torch.zeros(1, dtype=torch.int64), torch.ones(1, 1)
    for rows in (torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bfloat16)):
        kernels.permute(rows, index, 1)
        kernels.unpermute(rows, index, weights)
        kernels.unpermute_gradients(rows, rows, index, weights)


def main() -> None:
    start = time.perf_counter()
    decoding = body()
    if decoding is not None:
        compile_decoding(decoding)
        compile_fp8(body_for(torch.empty(0)))
        compile_attention(body_for(torch.empty(0)))
        compile_dispatch(body_for(torch.empty(0)))
    print(f"kernels: {active()}, ready after {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
