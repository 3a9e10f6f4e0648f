"""What the CUDA kernels have to do, on whatever runs them; as a program it does it here and prints a line per check."""

import itertools
import json

import attending
import torch

from deepseek_lab import kernels, precision
from deepseek_lab.kernels import reference
from deepseek_lab.precision import FORMATS

EDGES = [0.0, -0.0, float("nan"), float("inf"), float("-inf"), 448, 464, -464.1, 480, 57344, 61440, 3.4e38, -1e-45,
         1e-39, 2**-10, 3 * 2**-11, 2**-9 * 1.5, 2**-17, 2**-16 * 1.5, 2**-133, -(2**-134) * 3]  # fmt: skip
TILES = [(1, 128), (128, 1), (4, 8), (10, 150)]


def numbers(*shape: int, seed: int) -> torch.Tensor:
    """Numbers of very different sizes: normal in a row, from 1e-6 to 1e3 along it."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-6, 3, shape[-1])


def codes(*shape: int, seed: int) -> torch.Tensor:
    """E4M3 codes, NaN not among them, many of them zero and, in the first row, all subnormal."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    made[(made & 0x7F) == 0x7F] = 3
    made[torch.rand(shape, generator=generator) < 0.3] = 0
    made[0] &= 0x87
    return made


def same(got: torch.Tensor, expected: torch.Tensor) -> int:
    """Assert the same bits, any NaN for a NaN, on the device of what came in; return how many."""
    assert (got.device, got.dtype, got.shape) == (expected.device, expected.dtype, expected.shape)
    if expected.is_floating_point():
        assert torch.equal(got.isnan(), expected.isnan())
        got, expected = (x.nan_to_num(nan=0.5).view(torch.int32) for x in (got, expected))
    wrong = (got != expected).nonzero()
    assert not len(wrong), f"{len(wrong)} of {got.numel()} differ, the first at {wrong[0].tolist()}"
    return got.numel()


def encode(body, device) -> int:
    bits = torch.randint(-(2**31), 2**31, (120,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = torch.cat([torch.tensor(EDGES), -torch.tensor(EDGES), bits.view(torch.float32), numbers(60, seed=1)])
    x = x.to(device).requires_grad_()
    count = 0
    for fmt, overflow in itertools.product(FORMATS.values(), ("saturate", "nan", "inf")):
        if overflow != "inf" or fmt.infinities:
            code = fmt.overflow_code(overflow)
            count += same(body.encode(x, fmt, code), reference.encode(x, fmt, code))
    columns = numbers(7, 5, seed=2).to(device).T
    return count + same(body.encode(columns, FORMATS["E4M3"], 0x7E), reference.encode(columns, FORMATS["E4M3"], 0x7E))


def decode(body, device) -> int:
    count, generator = 0, torch.Generator().manual_seed(9)
    for fmt in FORMATS.values():
        every = torch.arange(256) if fmt.bits == 8 else torch.randint(2**fmt.bits, (150,), generator=generator)
        for dtype in (torch.uint8, torch.int64) if fmt.bits == 8 else (torch.int64,):
            given = every.to(device, dtype).view(2, -1)
            count += same(body.decode(given, fmt), reference.decode(given, fmt))
    return count


def scaling(body, device, power_of_two: bool) -> int:
    """Ragged edges, a tile of zeros, one of tiny numbers; then what comes back from the codes."""
    count = 0
    for fmt, tile in itertools.product((FORMATS["E4M3"], FORMATS["E5M2"]), TILES):
        x = numbers(*((3, 150) if tile == (1, 128) else (140, 2) if tile == (128, 1) else (10, 15)), seed=3)
        x[1], x[2] = 0, x[2] * 1e-38
        x = x.to(device)
        got, expected = (some.quantize(x, fmt, tile, power_of_two) for some in (body, reference))
        count += sum(map(same, got, expected))
        count += same(body.dequantize(*expected, fmt, tile), reference.dequantize(*expected, fmt, tile))
    return count


def quantize(body, device) -> int:
    return scaling(body, device, power_of_two=False)


def quantize_to_powers_of_two(body, device) -> int:
    return scaling(body, device, power_of_two=True)


def quantize_nan_and_infinity(body, device) -> int:
    """All NaN get one code: the sign of a NaN that a division makes is the processor's choice."""
    x, fmt = numbers(4, 16, seed=4).to(device), FORMATS["E4M3"]
    x[0, 1], x[2, 9], x[3, 0] = float("nan"), float("inf"), float("-inf")
    return sum(map(same, *(some.quantize(x, fmt, (1, 8), False) for some in (body, reference))))


def default_dtype(body, device) -> int:
    """What torch takes for a number's type elsewhere changes nothing here."""
    fmt, x = FORMATS["E4M3"], numbers(2, 8, seed=4).to(device)
    torch.set_default_dtype(torch.float64)
    try:
        pairs = [[*some.quantize(x, fmt, (1, 8), False)] for some in (body, reference)]
        codes, scales = pairs[1]
        for some, found in zip((body, reference), pairs, strict=True):
            found += some.decode(codes, fmt), some.dequantize(codes, scales, fmt, (1, 8))
            found += (some.product(codes, codes, scales, scales, 32),)
            assert [x.dtype for x in found[1:]] == [torch.float32] * 4
        return sum(map(same, *pairs))
    finally:
        torch.set_default_dtype(torch.float32)


def product(body, device) -> int:
    """Ragged in all three directions, segments of one and several chains; cancellation; and NaN in a row."""
    count = 0
    for rows, columns, depth, step in [(5, 6, 70, 32), (3, 9, 150, 64), (4, 4, 256, 128), (2, 3, 96, 256)]:
        a, b = codes(rows, depth, seed=5).to(device), codes(columns, depth, seed=6).to(device)
        b[1, 1::2] = b[1, 0:-1:2] ^ 0x80  # with equal neighbours in a, every second product takes the first away
        a[1, 1::2] = a[1, 0:-1:2]
        if columns == 9:
            a[2, 100] = 0xFF
        segments = -(-depth // step)
        scales = [numbers(size, segments, seed=7).abs().to(device) for size in (rows, columns)]
        count += same(body.product(a, b, *scales, step), reference.product(a, b, *scales, step))
    return count


def attention(body, device) -> int:
    """Heads and slots that fill no block and no tile, lengths of 0 and 1, memories that lie apart; within the bound."""
    count = 0
    for kind, (heads, slots, latent, rope) in itertools.product(attending.MEMORIES, [(5, 19, 6, 2), (3, 9, 130, 3)]):
        q, memory, joint = attending.case(kind, 3, heads, slots, latent, rope, seed=10)
        lengths, there = torch.tensor([slots, 0, 1]), [part.to(device) for part in memory]
        got = attending.attend(body, q.to(device), there, lengths.to(device), 0.3, latent)
        assert got.device == q.to(device).device
        share = attending.worst(got.cpu(), q, joint, lengths, 0.3, latent)
        assert share <= 1, f"{kind}: {share} of the bound"
        count += got.numel()
    return count


def sorting(tokens: int, choices: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An order of slots, as of a router with four experts, and its inverse."""
    experts = torch.randint(4, (tokens * choices,), generator=torch.Generator().manual_seed(seed))
    order = experts.argsort(stable=True)
    return order, order.argsort()


def dispatch(body, device) -> int:
    """Rows shorter and longer than a warp and than a block, one choice and several; NaN and infinity in a row."""
    count = 0
    for dtype, (tokens, choices, hidden) in itertools.product(
        (torch.float32, torch.bfloat16), [(3, 2, 70), (1, 3, 5), (4, 1, 32)]
    ):
        x, answers = numbers(tokens, hidden, seed=11), numbers(tokens * choices, hidden, seed=12)
        answers[0, :3] = torch.tensor([float("nan"), float("inf"), 3.4e38])
        weights = torch.rand(tokens, choices, generator=torch.Generator().manual_seed(13)).to(device) + 0.5
        order, back = (index.to(device) for index in sorting(tokens, choices, seed=14))
        x, answers = (rows.to(device, dtype) for rows in (x, answers))
        for call, *given in [
            ("permute", x, order, choices),
            ("unpermute", answers, back, weights),
            ("unpermute_gradients", x, answers, order, weights),
        ]:
            got, expected = (getattr(some, call)(*given) for some in (body, reference))
            pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
            count += sum(same_rows(*pair) for pair in pairs)
    none = torch.ones(0, 4, device=device), torch.ones(0, dtype=torch.int64, device=device)
    assert body.permute(*none, 2).shape == (0, 4)
    assert body.unpermute(*none, torch.ones(0, 2, device=device)).shape == (0, 4)
    return count


def same_rows(got: torch.Tensor, expected: torch.Tensor) -> int:
    """The same for rows in BF16 too."""
    assert got.dtype == expected.dtype
    return same(got.float(), expected.float())


def nothing(body, device) -> int:
    """Tensors without elements, with and without the other axis."""
    fmt, scales = FORMATS["E4M3"], torch.ones(3, 0, device=device)
    none, row = torch.ones(0, 5, device=device), torch.zeros(3, 0, dtype=torch.uint8, device=device)
    count = same(body.encode(none, fmt, 0x7E), reference.encode(none, fmt, 0x7E))
    count += sum(map(same, body.quantize(none, fmt, (1, 4), False), reference.quantize(none, fmt, (1, 4), False)))
    return count + same(body.product(row, row, scales, scales, 32), reference.product(row, row, scales, scales, 32))


def chosen(body, device) -> int:
    """LAB_KERNELS=cuda, or a tensor on a GPU, brings the library's functions to these kernels, with the same answer."""
    x = numbers(3, 40, seed=8).to(device)
    assert kernels.body_for(x) is body
    got = precision.quantize_tiles(x)
    expected = reference.quantize(x, precision.E4M3, (1, 128), False)
    return same(got.codes.view(torch.uint8), expected[0]) + same(got.scales, expected[1])


CHECKS = {
    check.__name__: check
    for check in (
        encode,
        decode,
        quantize,
        quantize_to_powers_of_two,
        quantize_nan_and_infinity,
        default_dtype,
        product,
        attention,
        dispatch,
        nothing,
        chosen,
    )
}


def main() -> None:
    from deepseek_lab.kernels import cuda_device, numba_cuda

    print(json.dumps(["runs on", cuda_device.runs_on()]))
    for name, check in CHECKS.items():
        try:
            print(json.dumps([name, check(numba_cuda, "cpu")]))
        except AssertionError as error:
            print(json.dumps([name, str(error) or "a shape, a device or a NaN differs"]))


if __name__ == "__main__":
    main()
