"""`python -m deepseek_lab.kernels` compiles every kernel once; later processes read them from Numba's cache."""

import time

import numpy as np

from .dispatch import active, body


def compile_all(kernels) -> None:
    """Call each kernel on the smallest arrays of the types that a model gives it: [batch 1], every width 2."""
    weight, stack = (np.ones((2,) * axes, np.float32) for axes in (2, 3))
    x, norm, memory = (np.ones(shape, np.float32) for shape in [(1, 2), (2,), (1, 1, 4)])
    kernels.attention(x, norm, weight, norm, np.ones((4, 2), np.float32), np.ones((4, 2), np.float32), norm,
                      np.ones((1, 4, 2), np.float32), weight, np.ones(3, np.float32), np.ones((1, 2), np.float32),
                      memory, 0, 1.0)  # fmt: skip
    kernels.dense(x, norm, 1e-6, weight, weight, weight)
    kernels.experts(x, norm, 1e-6, weight, norm, np.ones((2, 4, 2), np.float32), stack, weight, weight, weight,
                    np.zeros((1, 1), np.int64), True, 1, 1, 1, True, 1.0)  # fmt: skip
    kernels.logits(x, norm, 1e-6, weight)


def main() -> None:
    start = time.perf_counter()
    kernels = body()
    if kernels is not None:
        compile_all(kernels)
    print(f"kernels: {active()}, ready after {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
