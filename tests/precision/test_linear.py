"""Fp8Linear is the three quantised products and nothing else, keeps codes for the way back, and obeys its policy."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_lab.precision import (
    E4M3,
    E5M2,
    FloatFormat,
    Fp8Linear,
    PrecisionPolicy,
    fast_bf16,
    fp8_matmul,
    linear,
    matmul,
    quantize,
    quantize_blocks,
    quantize_tensor,
    quantize_tiles,
)
from deepseek_lab.precision.linear import narrow_linear, round_through, weight_in_use

V3 = PrecisionPolicy()
ONE_SCALE = V3.replace(activations="tensor", weights="tensor", gradients="tensor")


def operands(tokens: int = 150, width: int = 200, out: int = 170, seed: int = 0):
    """x, weight and dy with outliers in some channels and tokens, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, dy = (
        torch.randn(*shape, generator=generator) for shape in ((tokens, width), (out, width), (tokens, out))
    )
    x[:, ::50] *= 30
    dy[::7] *= 50
    return x, weight * 0.05, dy


def three_products(x, weight, dy, policy):
    """y, dx and dW of a narrow linear layer."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = narrow_linear(x, weight, policy)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad


def twice_rounded(x, **how):
    """Activations kept in 1 x 128 tiles, for the product that sums over tokens."""
    return quantize_tiles(quantize_tiles(x, **how).dequantize(), axis=-2, **how)


def tiles_of_gradient(dy, tile, **how):
    """Gradients in tiles whose scales follow them down to the smallest: by 2^40 up, and their scales down again."""
    lifted = quantize(dy * 2.0**40, tile, **how)
    return lifted._replace(scales=lifted.scales / 2.0**40)


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_the_products_are_those_of_the_quantised_operands_bit_for_bit(scale):
    x, weight, dy = operands()
    y, dx, dw = three_products(x, weight, dy, V3.replace(scale=scale))
    how = {"scale": scale}
    codes = quantize_blocks(weight, **how)
    assert torch.equal(y, fp8_matmul(quantize_tiles(x, **how), codes))
    assert torch.equal(dx, tiles_of_gradient(dy, (1, 128), **how).dequantize() @ codes.dequantize())
    kept = twice_rounded(x, **how)
    assert torch.equal(dw, tiles_of_gradient(dy, (128, 1), **how).dequantize().T @ kept.dequantize())


@pytest.mark.parametrize("promote_every", [32, 128])
def test_the_h800_adds_up_all_three_products(promote_every):
    x, weight, dy = operands(70, 140, 130)
    y, dx, dw = three_products(x, weight, dy, V3.replace(accumulator="h800", promote_every=promote_every))
    codes, how = quantize_blocks(weight), ("h800", promote_every)
    assert torch.equal(y, fp8_matmul(quantize_tiles(x), codes, *how))
    assert torch.equal(dx, fp8_matmul(tiles_of_gradient(dy, (1, 128)), codes.T, *how))
    assert torch.equal(dw, fp8_matmul(tiles_of_gradient(dy, (128, 1)).T, twice_rounded(x).T, *how))


def test_without_promotion_a_long_sum_over_tokens_loses_more():
    x, weight, dy = operands(4096, 8, 8)
    rule = ONE_SCALE.replace(accumulator="h800")
    exact = three_products(x.abs(), weight, dy.abs(), ONE_SCALE)[2]
    promoted = three_products(x.abs(), weight, dy.abs(), rule)[2]
    never = three_products(x.abs(), weight, dy.abs(), rule.replace(promote_every=None))[2]
    assert relative(never, exact) > 10 * relative(promoted, exact)


def test_bf16_products_read_bf16_and_add_in_float32():
    x, weight, dy = operands()
    y, dx, dw = three_products(x, weight, dy, PrecisionPolicy(products="bf16"))
    x, weight, dy = (t.bfloat16().float() for t in (x, weight, dy))
    assert torch.equal(y, x @ weight.T) and torch.equal(dx, dy @ weight) and torch.equal(dw, dy.T @ x)


@pytest.mark.parametrize("rules", [{"products": "bf16"}, {}, {"accumulator": "h800"}], ids=["bf16", "fp8", "h800"])
def test_outputs_in_bf16_are_the_same_sums_rounded(rules, monkeypatch):
    monkeypatch.setattr(linear, "fast_bf16", lambda: False)
    sums = three_products(*operands(), V3.replace(**rules))
    rounded = three_products(*operands(), V3.replace(**rules, outputs="bf16"))
    assert all(torch.equal(ours, exact.bfloat16().float()) for ours, exact in zip(rounded, sums, strict=True))


def test_the_processors_own_bf16_products_differ_in_the_order_of_the_sum_alone(monkeypatch):
    """Where two orders lie on two sides of a tie, the last bit of eight tips: seldom, unless sums are kept in BF16."""
    found = []
    for fast in (False, True):
        monkeypatch.setattr(linear, "fast_bf16", lambda fast=fast: fast)
        found.append(three_products(*operands(600), PrecisionPolicy(products="bf16", outputs="bf16")))
    for ours, theirs in zip(*found, strict=True):
        largest = theirs.abs().max()
        assert (ours != theirs).float().mean() < 0.01 and (ours - theirs).abs().max() < 2.0**-7 * largest


def test_only_bf16_products_with_bf16_outputs_take_the_processors_own(monkeypatch):
    taken = []
    monkeypatch.setattr(linear, "fast_bf16", lambda: True)
    monkeypatch.setattr(linear, "without_autocast", lambda product, a, b: taken.append(a.dtype) or product(a, b))
    for products, outputs in (("fp8", "bf16"), ("bf16", "fp32"), ("bf16", "bf16")):
        three_products(*operands(), V3.replace(products=products, outputs=outputs))
    assert taken == 6 * [torch.float32] + 3 * [torch.bfloat16]


def test_how_fast_bf16_is_is_measured_once(monkeypatch):
    fast = fast_bf16()
    monkeypatch.setattr(matmul, "timeit", None)
    assert isinstance(fast, bool) and fast_bf16() is fast


def test_fp32_products_are_those_of_a_plain_layer():
    x, weight, dy = operands()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = nn.functional.linear(x, weight)
    y.backward(dy)
    ours = three_products(x.detach(), weight.detach(), dy, PrecisionPolicy(products="fp32"))
    assert all(torch.equal(a, b) for a, b in zip(ours, (y, x.grad, weight.grad), strict=True))


def test_eight_bits_cost_a_few_per_cent_and_sixteen_a_few_per_mille():
    exact = three_products(*operands(), PrecisionPolicy(products="fp32"))
    for policy, least, most in ((V3, 0.01, 0.06), (PrecisionPolicy(products="bf16"), 0.001, 0.005)):
        for ours, theirs in zip(three_products(*operands(), policy), exact, strict=True):
            assert least < relative(ours, theirs) < most


@pytest.mark.parametrize("policy", [V3, V3.replace(accumulator="h800"), V3.replace(gradients="tensor")])
def test_gradients_as_small_as_those_of_a_mean_over_many_tokens_keep_their_precision(policy):
    x, weight, dy = operands()
    _, dx, dw = three_products(x, weight, dy, policy)
    _, small_dx, small_dw = three_products(x, weight, dy * 2.0**-33, policy)  # 1e-10 of them
    assert torch.equal(small_dx * 2.0**33, dx) and torch.equal(small_dw * 2.0**33, dw)


# Each rule changes what it should and nothing else -----------------------------------------------------------------

CHANGES = {
    "activations": ("tensor", {"y", "dw"}),
    "weights": ("tensor", {"y", "dx"}),
    "gradients": ("tensor", {"dx", "dw"}),
    "gradient_format": (E5M2, {"dx", "dw"}),
    "scale": ("ue8m0", {"y", "dx", "dw"}),
    "accumulator": ("h800", {"y", "dx", "dw"}),
    "promote_every": (32, set()),  # nothing without the H800's accumulator
    "products": ("bf16", {"y", "dx", "dw"}),
    "outputs": ("bf16", {"y", "dx", "dw"}),
    "wide": ((), set()),  # a linear layer is none of the places
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_rule_changes_the_products_that_it_is_about(name):
    value, changed = CHANGES[name]
    before = three_products(*operands(300, 256, 256), V3)
    after = three_products(*operands(300, 256, 256), V3.replace(**{name: value}))
    named = zip(("y", "dx", "dw"), before, after, strict=True)
    assert {part for part, a, b in named if not torch.equal(a, b)} == changed


def test_every_rule_is_tested():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(PrecisionPolicy)}


@pytest.mark.parametrize(("kind", "tile"), [("block", (128, 128)), ("tensor", (150, 170))])
def test_gradients_of_one_block_use_the_same_codes_both_ways(kind, tile):
    x, weight, dy = operands()
    policy = V3.replace(gradients=kind, gradient_format=E5M2)
    _, dx, dw = three_products(x, weight, dy, policy)
    codes = tiles_of_gradient(dy, tile, fmt=E5M2)
    assert torch.equal(dx, codes.dequantize() @ quantize_blocks(weight).dequantize())
    assert torch.equal(dw, codes.dequantize().T @ twice_rounded(x).dequantize())


def test_one_scale_for_the_activations_is_not_rounded_twice():
    x, weight, dy = operands()
    dw = three_products(x, weight, dy, V3.replace(activations="tensor"))[2]
    assert torch.equal(dw, tiles_of_gradient(dy, (128, 1)).dequantize().T @ quantize_tensor(x).dequantize())


# What is kept ------------------------------------------------------------------------------------------------------


def saved_bytes(run) -> int:
    """Bytes of all tensors that autograd keeps while `run` computes, parameters counted once each."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def test_codes_and_scales_are_kept_and_no_copy_in_float32():
    x, weight, _ = (t.requires_grad_() for t in operands(300, 200, 170))
    codes, scales = 300 * 200 + 170 * 200, 4 * (300 * 2 + 2 * 2)
    assert saved_bytes(lambda: narrow_linear(x, weight, V3)) == codes + scales
    assert saved_bytes(lambda: narrow_linear(x, weight, PrecisionPolicy(products="bf16"))) == 2 * codes
    assert saved_bytes(lambda: nn.functional.linear(x, weight)) == 4 * codes


def test_master_weights_and_their_gradients_stay_in_float32():
    layer = Fp8Linear(200, 170)
    layer(torch.randn(10, 200)).sum().backward()
    assert layer.weight.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


def test_the_weight_is_quantised_once_for_both_products(monkeypatch):
    tiles = []

    def counting(x, tile, *args, **kwargs):
        tiles.append(tile)
        return quantize(x, tile, *args, **kwargs)

    monkeypatch.setattr(linear, "quantize", counting)
    three_products(*operands(), V3)
    assert sorted(tiles) == [(1, 128), (1, 128), (128, 1), (128, 1), (128, 128)]


# A drop-in ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_it_stands_in_for_a_plain_layer(bias):
    torch.manual_seed(1)
    plain, layer = nn.Linear(40, 30, bias=bias), Fp8Linear(40, 30, bias=bias)
    layer.load_state_dict(plain.state_dict())
    shared = Fp8Linear.from_linear(plain)
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert shared.weight is plain.weight and shared.bias is plain.bias
    x = torch.randn(2, 3, 5, 40)
    assert layer(x).shape == (2, 3, 5, 30)
    assert torch.equal(layer(x), shared(x))
    assert torch.equal(layer(x), layer(x.flatten(0, 2)).view(2, 3, 5, 30))
    assert relative(layer(x), plain(x)) < 0.06
    torch.testing.assert_close(layer(x[0, 0, 0]), layer(x)[0, 0, 0])


def test_the_gradient_of_the_bias_is_the_plain_sum():
    layer, dy = Fp8Linear(40, 30), torch.randn(6, 30)
    layer(torch.randn(6, 40)).backward(dy)
    assert torch.equal(layer.bias.grad, dy.sum(0))


@pytest.mark.parametrize("policy", [V3, V3.replace(accumulator="h800"), PrecisionPolicy(products="bf16")])
def test_no_tokens_give_no_outputs_and_a_gradient_of_zero(policy):
    layer = Fp8Linear(40, 30, policy=policy)
    x = torch.zeros(0, 40, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 40)
    assert layer.weight.grad.abs().sum() == 0


def test_no_gradient_is_made_where_none_is_needed():
    x, weight, dy = operands()
    y = narrow_linear(x, weight.requires_grad_(), V3)
    y.backward(dy)
    assert x.grad is None and torch.equal(weight.grad, three_products(x, weight.detach(), dy, V3)[2])
    x, frozen = x.requires_grad_(), weight.detach()
    narrow_linear(x, frozen, V3).backward(dy)
    assert torch.equal(x.grad, three_products(x.detach(), frozen, dy, V3)[1])


def test_bfloat16_goes_in_and_comes_out():
    layer = Fp8Linear(40, 30).bfloat16()
    x = torch.randn(5, 40).bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == torch.bfloat16
    assert torch.equal(y, narrow_linear(x.float(), layer.weight.float()).bfloat16() + layer.bias)


@pytest.mark.parametrize("policy", [V3, PrecisionPolicy(products="bf16")], ids=["V3", "bf16"])
def test_bfloat16_comes_out_beside_a_bias_in_float32_too(policy):
    layer, x = Fp8Linear(40, 30, policy=policy), torch.randn(5, 40).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, (narrow_linear(x, layer.weight, policy).float() + layer.bias).bfloat16())


@pytest.mark.parametrize("policy", [V3, V3.replace(accumulator="h800"), PrecisionPolicy(products="bf16")],
                         ids=["V3", "h800", "bf16"])  # fmt: skip
def test_autocast_takes_no_bits_of_the_three_products(policy):
    plain = three_products(*operands(), policy)
    with torch.autocast("cpu", torch.bfloat16):
        cast = three_products(*operands(), policy)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(cast, plain, strict=True))


def test_a_layer_on_no_device_says_the_shape_of_its_answer():
    layer = Fp8Linear(40, 30, device="meta")
    assert layer(torch.empty(2, 5, 40, device="meta")).shape == (2, 5, 30)


def test_a_gradient_that_is_one_value_seen_many_times_is_taken():
    layer = Fp8Linear(40, 30)
    layer(torch.randn(5, 40)).sum().backward()  # its gradient is an expanded scalar
    assert layer.weight.grad.isfinite().all()


def test_not_a_number_loses_its_tile_and_no_other():
    x, weight, _ = operands()
    x[3, 130] = torch.nan
    y = narrow_linear(x, weight, V3)
    assert y[3].isnan().all() and y[torch.arange(len(y)) != 3].isfinite().all()


def test_an_input_of_the_wrong_width_is_refused():
    with pytest.raises(ValueError, match=r"a layer of 40 inputs got x of shape \(5, 30\)"):
        Fp8Linear(40, 30)(torch.randn(5, 30))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 140), st.integers(1, 140), st.integers(1, 140), st.integers(0, 9))
def test_ragged_sizes_give_the_products_of_the_quantised_operands(tokens, width, out, seed):
    x, weight, dy = operands(tokens, width, out, seed)
    y, dx, dw = three_products(x, weight, dy, V3)
    codes = quantize_blocks(weight).dequantize()
    torch.testing.assert_close(y, quantize_tiles(x).dequantize() @ codes.T)
    torch.testing.assert_close(dx, tiles_of_gradient(dy, (1, 128)).dequantize() @ codes)
    torch.testing.assert_close(dw, tiles_of_gradient(dy, (128, 1)).dequantize().T @ twice_rounded(x).dequantize())


# Rounding alone ----------------------------------------------------------------------------------------------------


def test_a_rounding_lets_the_gradient_through():
    x = torch.randn(3, 5, 200, requires_grad=True)
    dy = torch.randn(3, 5, 200)
    y = round_through(x, V3)
    y.backward(dy)
    assert torch.equal(y, quantize_tiles(x).dequantize()) and torch.equal(x.grad, dy)
    assert round_through(x, PrecisionPolicy(products="fp32")) is x


def test_the_weight_in_use_is_what_the_products_read():
    layer = Fp8Linear(200, 170)
    assert torch.equal(weight_in_use(layer), quantize_blocks(layer.weight).dequantize())
    plain = nn.Linear(3, 2)
    assert weight_in_use(plain) is plain.weight


# Policies that cannot be -------------------------------------------------------------------------------------------


def test_the_policy_of_deepseek_v3_is_the_default():
    assert (V3.products, V3.activations, V3.weights, V3.gradients) == ("fp8", "tile", "block", "tile")
    assert V3.gradient_format is E4M3 and V3.promote_every == 128
    assert V3.wide == {"embedding", "head", "gate", "norms", "attention core"}
    assert PrecisionPolicy(gradient_format="E4M3", wide=["head", "gate", "norms", "embedding", "attention core"]) == V3
    assert hash(V3) == hash(PrecisionPolicy())


def test_a_copied_policy_is_the_same_policy():
    layer = copy.deepcopy(Fp8Linear(200, 170, policy=V3.replace(accumulator="h800")))
    assert layer.policy == V3.replace(accumulator="h800") and layer.policy.replace(promote_every=64).promote_every == 64
    assert layer(torch.randn(3, 200)).shape == (3, 170)


def test_a_layer_refuses_what_is_no_policy_when_it_is_made():
    for make in (lambda: Fp8Linear(8, 8, policy="fp8"), lambda: Fp8Linear.from_linear(nn.Linear(8, 8), "fp8")):
        with pytest.raises(TypeError, match="Fp8Linear got 'fp8'; pass a PrecisionPolicy"):
            make()


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"products": "fp4"}, "got products='fp4'; choose one of 'fp8', 'bf16', 'fp32'"),
        ({"activations": "row"}, "got activations='row'; choose one of 'tile', 'block', 'tensor'"),
        ({"weights": "tile"}, "got weights='tile'; choose one of 'block', 'tensor'"),
        ({"gradients": None}, "got gradients=None"),
        ({"scale": "e8m0"}, "got scale='e8m0'; choose one of 'fp32', 'ue8m0'"),
        ({"accumulator": "h100"}, "got accumulator='h100'; choose one of 'fp32', 'h800'"),
        ({"promote_every": 100}, "got promote_every=100; choose one of 32, 64, 128, None"),
        ({"gradient_format": "E4M4"}, "format 'E4M4' is unknown"),
        ({"gradient_format": "BF16"}, r"gradient_format=FloatFormat\(name='BF16'.*choose E4M3 or E5M2"),
        ({"gradient_format": FloatFormat("E3M4", 3, 4, 3)}, "choose E4M3 or E5M2"),
        ({"accumulator": "h800", "promote_every": 128.0}, "got promote_every=128.0; choose one of 32, 64, 128, None"),
        ({"wide": None}, "got wide=None; the places are embedding"),
        ({"wide": {3, "zz"}}, "got wide="),
        ({"wide": 3}, "got wide=3"),
        ({"wide": {"router"}}, "got wide='router'; the places are embedding, head, gate, norms, attention core"),
        ({"wide": "router"}, "got wide='router'"),
        ({"accumulator": "h800", "gradient_format": E5M2}, "multiplies E4M3 with E4M3"),
        ({"accumulator": "h800", "promote_every": None}, 'need one scale: "tensor"'),
    ],
)
def test_a_policy_that_cannot_be_is_refused_by_name(rules, words):
    with pytest.raises(ValueError, match=words):
        PrecisionPolicy(**rules)
