"""What the CUDA kernels run on: Numba's compiler, a few PTX instructions by name, and how a kernel is started.

With NUMBA_ENABLE_CUDASIM=1, set before Python starts, Numba runs the same kernels in Python threads: slow, and without
a GPU. Only the instructions have another body there.

Sources: PTX ISA, mul, div and cvt; numba-cuda's documentation, "CUDA Array Interface" and "CUDA simulator".
"""

from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

try:
    from numba import cuda  # the only place that names the compiler
except ImportError as error:
    raise ImportError('this Numba comes without CUDA; install the extra: pip install -e ".[cuda]"') from error

cuda.config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # a small tensor needs few threads, and that is no mistake

SIMULATED = bool(cuda.config.ENABLE_CUDASIM)
THREADS = 32 if SIMULATED else 256  # at most, in a block; the simulator starts a Python thread for each
LETTERS = {types.int16: "h", types.int32: "r", types.float32: "f"}

# inlined where it is called: a call would make compile_ptx look for a GPU
inlined = cuda.jit(device=True, inline="always")


def instruction(text: str, result, *arguments):
    """Return a device function of one or two arguments that is this PTX instruction and stays what it is."""

    def typed(*_):
        def codegen(context, builder, signature, values):
            kinds = [context.get_value_type(kind) for kind in (result, *arguments)]
            letters = ",".join(LETTERS[kind] for kind in (result, *arguments))
            return builder.call(ir.InlineAsm(ir.FunctionType(kinds[0], kinds[1:]), text, f"={letters}"), values)

        return result(*arguments), codegen

    if len(arguments) == 1:
        return intrinsic(lambda typing_context, a: typed())
    return intrinsic(lambda typing_context, a, b: typed())


if SIMULATED:

    def bits_of(x):
        return int(np.float32(x).view(np.int32))

    def number_of(bits):
        return np.int32(bits).view(np.float32)

    def times(a, b):
        with np.errstate(all="ignore"):  # infinity is an answer here
            return np.float32(a) * np.float32(b)

    def divide(a, b):
        with np.errstate(all="ignore"):
            return np.float32(a) / np.float32(b)
else:
    bits_of = instruction("mov.b32 $0, $1;", types.int32, types.float32)
    number_of = instruction("mov.b32 $0, $1;", types.float32, types.int32)
    # .rn, because a plain mul.f32 may be fused with the addition after it, which rounds once where two are defined
    times = instruction("mul.rn.f32 $0, $1, $2;", types.float32, types.float32, types.float32)
    divide = instruction("div.rn.f32 $0, $1, $2;", types.float32, types.float32, types.float32)


@cache
def runs_on() -> str:
    """Return what runs these kernels: "the simulator", or a GPU's name. Raises RuntimeError where nothing can."""
    if SIMULATED:
        return "the simulator"
    found = {"torch": torch.cuda.is_available(), "Numba": cuda.is_available()}
    if all(found.values()):
        return torch.cuda.get_device_name()
    blind = " and ".join(name for name, sees in found.items() if not sees)
    raise RuntimeError(
        f"the CUDA kernels need an NVIDIA GPU, and {blind} (torch {torch.__version__}) cannot use one here. Unset "
        "LAB_KERNELS to compute on the CPU. If there is a GPU, install its driver, a CUDA build of torch and "
        'pip install -e ".[cuda]". To simulate one, for small tensors, set NUMBA_ENABLE_CUDASIM=1 before Python starts'
    )


def has_fp8() -> bool:
    """Whether the GPU converts to FP8 by itself: from compute capability 8.9 on."""
    return not SIMULATED and torch.cuda.get_device_capability() >= (8, 9)


def bring(*tensors: Tensor) -> list[Tensor]:
    """Return tensors where kernels can read them, contiguous; those that lie there already are not copied."""
    runs_on()
    return [tensor.detach().to("cpu" if SIMULATED else "cuda").contiguous() for tensor in tensors]


def start(kernel, blocks, threads, *arguments) -> None:
    """Run a kernel on `blocks` blocks of `threads` threads, after what torch has started before; tensors as they lie.

    Where a tensor is empty there is nothing to do.
    """
    if not all(a.numel() for a in arguments if isinstance(a, Tensor)):
        return
    current = 0 if SIMULATED else torch.cuda.current_stream().cuda_stream
    stream = cuda.external_stream(current) if current else 0
    view = Tensor.numpy if SIMULATED else cuda.as_cuda_array
    kernel[blocks, threads, stream](*(view(a) if isinstance(a, Tensor) else a for a in arguments))
