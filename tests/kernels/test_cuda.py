"""The CUDA kernels give the bits of the reference: in Numba's simulator, as PTX where nothing can run it, on a GPU.

Attention, whose sums run in another order, is within its bound instead.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_checks
import pytest
import torch

from deepseek_lab.kernels import (
    cuda_device,
    numba_cuda,
    numba_cuda_attention,
    numba_cuda_dispatch,
    numba_cuda_product,
    reference,
)
from deepseek_lab.precision import E4M3, E5M2, FORMATS

HOPPER = (9, 0)
# of 65,536 for 256 threads
REGISTERS = {"encode": 32, "decode": 32, "product": 64, "quantize": 80, "dequantize": 80, "attention": 128,
             "permute": 32, "unpermute": 40, "gradients": 40}  # fmt: skip


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LAB_KERNELS": "cuda", **environment}
    return subprocess.run([sys.executable, "-W", "error", *arguments], env=here, capture_output=True, text=True)


@pytest.fixture(scope="module")
def simulated():
    """What every check said in the simulator, which has to be chosen before Python starts."""
    made = python(cuda_checks.__file__, NUMBA_ENABLE_CUDASIM="1")
    assert made.returncode == 0, made.stderr
    return dict(json.loads(line) for line in made.stdout.splitlines())


@pytest.mark.parametrize("name", cuda_checks.CHECKS)
def test_the_simulator_gives_the_bits_of_the_reference(simulated, ran, name):
    assert simulated["runs on"] == "the simulator"
    assert isinstance(simulated[name], int), simulated[name]
    assert simulated[name] > 0
    ran["in the simulator"] = f"{len(simulated) - 1} checks, bit for bit the reference, attention within its bound"


def test_without_a_gpu_the_first_use_says_what_is_missing():
    script = "import torch, deepseek_lab as lab; lab.precision.encode(torch.ones(2), 'E4M3')"
    made = python("-c", script, NUMBA_ENABLE_CUDASIM="0", CUDA_VISIBLE_DEVICES="")
    assert made.returncode == 1
    message = made.stderr.splitlines()[-1]
    assert message.startswith("RuntimeError: the CUDA kernels need an NVIDIA GPU, and torch")
    assert "Unset LAB_KERNELS" in message
    assert "NUMBA_ENABLE_CUDASIM=1" in message


def kernels() -> dict:
    """Every kernel as it is built for a Hopper GPU, with the types of its arguments."""
    from numba import types

    line, matrix = (lambda kind: kind[::1]), (lambda kind: kind[:, ::1])
    f32, u8, i16, whole = types.float32, types.uint8, types.int16, types.int64
    code = {8: u8, 16: types.int32, 19: types.int32, 32: whole}
    made = {}
    for name, fmt in FORMATS.items():
        for overflow in ("saturate", "nan"):
            kernel = numba_cuda.encode_kernel(fmt, fmt.overflow_code(overflow), True)
            made[f"encode {name} {overflow}"] = kernel, (line(f32), line(code[fmt.bits]))
        made[f"decode {name}"] = numba_cuda.decode_kernel(fmt), (line(code[fmt.bits]), line(f32))
    for fmt in (E4M3, E5M2):
        for rows, columns in [(1, 128), (128, 1), (128, 128)]:
            shape, tile = numba_cuda.block_shape(rows, columns), f"{fmt.name} {rows} x {columns}"
            for fp8 in (True, False):
                made[f"quantize {tile} {'by instruction' if fp8 else 'by bits'}"] = (
                    numba_cuda.quantize_kernel(fmt, *shape, fp8),
                    (matrix(f32), whole, whole, types.boolean, matrix(u8), matrix(f32)),
                )
            arguments = matrix(u8), matrix(f32), whole, whole, matrix(f32)
            made[f"dequantize {tile}"] = numba_cuda.dequantize_kernel(fmt, *shape), arguments
    arguments = matrix(u8), matrix(u8), matrix(f32), matrix(f32), whole, matrix(f32)
    made |= {"product": (numba_cuda_product.product_kernel(), arguments)}
    pages = lambda kind: kind[:, :, ::1]  # noqa: E731
    for kind, latents, scales, ropes in [
        ("float32", f32, f32, f32),
        ("bfloat16", i16, i16, i16),
        ("float8", u8, f32, i16),
    ]:
        for latent, rope in [(512, 64), (64, 16)]:
            made[f"attention {kind} {latent} + {rope}"] = (
                numba_cuda_attention.attention_kernel(kind, latent, latent + rope),
                (*map(pages, (f32, latents, scales, ropes)), line(whole), f32, pages(f32)),
            )
    for kind, stored in [("float32", f32), ("bfloat16", i16)]:
        rows, index, weights = matrix(stored), line(whole), matrix(f32)
        made |= {
            f"permute {kind}": (numba_cuda_dispatch.permute_kernel(), (rows, index, whole, rows)),
            f"unpermute {kind}": (numba_cuda_dispatch.unpermute_kernel(kind), (rows, index, weights, rows)),
            f"gradients {kind}": (
                numba_cuda_dispatch.gradients_kernel(kind), (rows, rows, index, weights, rows, weights)),
        }  # fmt: skip
    return made


@pytest.fixture(scope="module")
def ptx():
    """The PTX of every kernel for a Hopper GPU, by name. It takes the extra `cuda`, and no GPU."""
    if importlib.util.find_spec("numba_cuda") is None:
        reason = "the extra `cuda` is not installed, so no PTX is made: make test EXTRAS=cuda"
        (pytest.fail if "cuda" in os.environ.get("EXTRAS", "") else pytest.skip)(reason)
    if cuda_device.SIMULATED:
        pytest.skip("NUMBA_ENABLE_CUDASIM is set, and the simulator makes no PTX")
    compile_ptx = cuda_device.cuda.compile_ptx
    return {
        name: compile_ptx(kernel.py_func, types, cc=HOPPER, device=False)[0]
        for name, (kernel, types) in kernels().items()
    }


def test_ptx_needs_nothing_from_elsewhere(ptx, ran):
    ran["as PTX for sm_90"] = f"{len(ptx)} kernels compiled"
    for name, text in ptx.items():
        assert text.count(".entry") == 1, name
        assert not re.search(r"\.extern|\bcall", text), name


def test_ptx_rounds_where_the_reference_rounds(ptx):
    """No product is fused with a sum, divisions are exact, subnormal numbers stay, and nothing is computed in FP64.

    Attention may fuse, and approximates 2^x to within 2^-22, both of which its bound allows for.
    """
    for name, text in ptx.items():
        if name.startswith("attention"):
            assert not re.search(r"\.full|\.f64\s", text), name
            assert set(re.findall(r"\S+\.approx\S*", text)) == {"ex2.approx.f32"}, name
            continue
        assert not re.search(r"\bfma|\bmad\.\S*f32|\.approx|\.full|\.ftz|\.f64\s", text), name
        assert ("div.rn.f32" in text) == name.startswith("quantize"), name
        assert ("mul.rn.f32" in text) == name.startswith(("dequantize", "product", "unpermute", "gradients")), name


def test_casts_are_the_instruction_of_the_hardware_where_it_does_the_same(ptx):
    for name, text in ptx.items():
        used = re.findall(r"cvt\.rn\.satfinite\.(\w+)x2\.f32", text)
        casts = name.startswith(("encode E", "quantize")) and not name.endswith(("nan", "bits"))
        assert set(used) == ({name.split()[1].lower()} if casts else set()), name


def test_ptx_assembles_without_spills(ptx, ran, tmp_path):
    assembler = shutil.which("ptxas")
    if assembler is None:
        pytest.skip("no ptxas on the PATH, so PTX is compiled and not assembled")
    most = 0
    for name, text in ptx.items():
        (tmp_path / "kernel.ptx").write_text(text)
        command = [assembler, "-arch=sm_90", "-v", "kernel.ptx", "-o", "kernel.cubin"]
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert said.returncode == 0, f"{name}: {said.stderr}"
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said.stderr, name
        registers = int(re.search(r"Used (\d+) registers", said.stderr)[1])
        assert registers <= REGISTERS[name.split()[0]], f"{name} takes {registers} registers"
        most = max(most, registers)
    release = subprocess.run([assembler, "--version"], capture_output=True, text=True).stdout
    ran["assembled"] = f"ptxas {re.search('release ([0-9.]+)', release)[1]}, no spills, at most {most} registers"


@pytest.fixture
def gpu():
    try:
        return cuda_device.runs_on()
    except RuntimeError:
        pytest.skip("no NVIDIA GPU that torch and Numba can use, so no kernel ran on one")


@pytest.mark.parametrize("name", cuda_checks.CHECKS)
def test_a_gpu_gives_the_bits_of_the_reference(gpu, ran, name, monkeypatch):
    monkeypatch.delenv("LAB_KERNELS", raising=False)
    assert cuda_checks.CHECKS[name](numba_cuda, "cuda") > 0
    ran["on a GPU"] = gpu


def test_a_gpu_takes_tensors_from_the_cpu_and_gives_them_back(gpu, monkeypatch):
    monkeypatch.setenv("LAB_KERNELS", "cuda")
    assert cuda_checks.chosen(numba_cuda, "cpu") > 0


def test_the_product_stands_beside_the_tensor_cores(gpu, ran):
    """Both lose, of the sum of all sizes in a segment of 128, at most 2^-13 per term: 4 chains of 33 terms and a cut.

    So each is within 4 * 34 * 2^-13 of the exact product of sizes, and they within twice that of each other.
    """
    if not numba_cuda.has_fp8():
        pytest.skip(f"{gpu} has no FP8 tensor cores, so the product has no peer here")
    a, b = (cuda_checks.codes(size, 512, seed=size).cuda() for size in (64, 48))
    scales = [torch.ones(len(x), 4, device="cuda") for x in (a, b)]
    ours = numba_cuda.product(a, b, *scales, 128)
    one, (a8, b8) = torch.ones((), device="cuda"), (x.view(torch.float8_e4m3fn) for x in (a, b))
    theirs = torch._scaled_mm(a8, b8.T, one, one, out_dtype=torch.float32, use_fast_accum=False)
    sizes = reference.decode(a, E4M3).double().abs() @ reference.decode(b, E4M3).double().abs().T
    assert ((ours - theirs).abs() <= 2 * 4 * 34 * 2.0**-13 * sizes).all()
    ran["beside torch._scaled_mm"] = f"{(ours == theirs).float().mean():.1%} of the sums have the same bits on {gpu}"


def test_one_file_names_the_compiler():
    """So that another package can take its place by one line."""
    files = (Path(cuda_device.__file__).parents[1]).rglob("*.py")
    naming = [
        path.name for path in files if re.search(r"from numba import .*\bcuda|numba\.cuda", path.read_text("utf-8"))
    ]
    assert naming == ["cuda_device.py"]
