"""A model by a policy: other arithmetic where the policy says so, the same parameters under the same names."""

import copy
import itertools

import pytest
import torch
from torch import nn

import deepseek_lab as lab
from deepseek_lab.experts.layer import Experts, grouped_linear
from deepseek_lab.generation import step
from deepseek_lab.model import apply_policy
from deepseek_lab.model.precision import NARROW, NarrowExperts
from deepseek_lab.precision import Fp8Linear, PrecisionPolicy, quantize_tiles
from deepseek_lab.precision.linear import narrow_linear
from deepseek_lab.precision.policy import PLACES

V3, WIDE = PrecisionPolicy(), PrecisionPolicy(products="fp32")
TINY = lab.PRESETS["tiny"].replace(num_hidden_layers=2)
DENSE = lab.PRESETS["llama-3.1-8b"].replace(
    vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.05,
)  # fmt: skip


def model_of(config=TINY, seed: int = 0):
    torch.manual_seed(seed)
    return lab.model.Transformer(config)


def tokens_of(seed: int = 0, batch: int = 2, length: int = 40):
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_and_gradients(model, tokens):
    model.zero_grad()
    logits = model(tokens)
    logits.logsumexp(-1).mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [TINY, DENSE], ids=["experts", "dense"])
def test_names_and_parameters_stay_the_same_objects(config):
    model = model_of(config)
    before, names = dict(model.named_parameters()), list(model.state_dict())
    assert apply_policy(model, V3.replace(wide=())) is model
    assert list(model.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("config", [TINY, DENSE], ids=["experts", "dense"])
def test_a_policy_can_be_undone_and_changed(config):
    model, tokens = model_of(config), tokens_of()
    classes = [type(module) for module in model.modules()]
    plain = model(tokens)
    narrow = apply_policy(model, V3)(tokens)
    everything = apply_policy(model, V3.replace(wide=()))(tokens)
    assert torch.equal(apply_policy(model, V3)(tokens), narrow)
    assert torch.equal(apply_policy(model, WIDE)(tokens), plain)
    assert [type(module) for module in model.modules()] == classes
    assert not any("policy" in vars(module) for module in model.modules())
    assert not torch.equal(narrow, plain) and not torch.equal(narrow, everything)


def test_every_linear_layer_of_the_blocks_is_narrow_and_the_wide_places_are_left():
    model = apply_policy(model_of(), V3)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, m in model.named_modules() if type(m) is Fp8Linear} == linear - {"lm_head"}
    assert type(model.layers[1].mlp.experts) is NarrowExperts
    others = {type(m) for m in model.modules()} & set(NARROW.values())
    assert others == {Fp8Linear, NarrowExperts}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("products", ["fp8", "bf16"])
@pytest.mark.parametrize("config", [TINY, DENSE], ids=["experts", "dense"])
def test_each_place_can_be_made_narrow_alone(config, products, place):
    model, tokens = model_of(config), tokens_of()
    policy = V3.replace(products=products)
    before, _ = logits_and_gradients(apply_policy(model, policy), tokens)
    after, gradients = logits_and_gradients(apply_policy(model, policy.replace(wide=V3.wide - {place})), tokens)
    absent = place == "gate" and config is DENSE
    assert torch.equal(before, after) == absent
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())


def test_the_narrow_places_round_what_the_documentation_says():
    plain = model_of()
    model = apply_policy(copy.deepcopy(plain), V3.replace(wide=()))
    tokens, x = tokens_of(), torch.randn(3, 5, 256)
    rounded = quantize_tiles(x).dequantize()
    assert torch.equal(model.embed_tokens(tokens), quantize_tiles(plain.embed_tokens(tokens)).dequantize())
    assert torch.equal(model.norm(x), plain.norm(rounded))
    assert torch.equal(model.lm_head(x), narrow_linear(x, plain.lm_head.weight))
    gates = model.layers[1].mlp.gate, plain.layers[1].mlp.gate
    assert torch.equal(gates[0].score(x[0]), narrow_linear(x[0], gates[1].weight))
    assert torch.equal(model.layers[0].self_attn.round_core(x), rounded)


def test_a_head_tied_to_the_embedding_stays_tied():
    model = apply_policy(model_of(DENSE.replace(tie_word_embeddings=True)), V3.replace(wide=()))
    assert model.lm_head.weight is model.embed_tokens.weight


def test_what_is_no_policy_is_refused():
    with pytest.raises(TypeError, match="apply_policy got 'fp8'; pass a PrecisionPolicy"):
        apply_policy(model_of(), "fp8")


def test_a_model_in_which_nothing_can_be_narrow_is_refused():
    with pytest.raises(
        ValueError, match="got a ReLU in which nothing can be made narrow; it changes Linear, Embedding"
    ):
        apply_policy(nn.ReLU(), V3)


def test_a_narrow_gate_of_a_bf16_model_has_logits_of_more_than_16_bits():
    model = apply_policy(model_of().bfloat16(), V3.replace(wide=()))
    gate, x = model.layers[1].mlp.gate, torch.randn(50, 256).bfloat16()
    logits = gate.score(x)
    assert torch.equal(logits, narrow_linear(x.float(), gate.weight.float()))
    assert not torch.equal(logits, logits.bfloat16().float())


# Experts -----------------------------------------------------------------------------------------------------------


def experts_and_slots(config=TINY, seed: int = 3):
    torch.manual_seed(seed)
    experts = Experts(config)
    load = torch.randint(0, 200, (config.n_routed_experts,))
    load[4] = 0
    return experts, torch.randn(int(load.sum()), config.hidden_size), load.cumsum(0, dtype=torch.int32)


def grouped(experts, x, ends, policy):
    x = x.clone().requires_grad_()
    experts.zero_grad()
    y = apply_policy(experts, policy).multiply(x, experts.gate_up_proj, ends)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    return y.detach(), x.grad, experts.gate_up_proj.grad.clone()


@pytest.mark.parametrize(
    "policy",
    [V3, V3.replace(scale="ue8m0"), V3.replace(gradient_format="E5M2"), PrecisionPolicy(products="bf16"),
     PrecisionPolicy(products="bf16", outputs="bf16"),
     V3.replace(activations="tensor", weights="tensor"), V3.replace(gradients="block"), V3.replace(accumulator="h800")],
    ids=["V3", "ue8m0", "E5M2", "bf16", "bf16 alone", "one scale", "blocks", "h800"],
)  # fmt: skip
@pytest.mark.parametrize("width", [64, 24], ids=["whole blocks", "ragged blocks"])
def test_each_expert_is_a_narrow_linear_layer_of_its_own(policy, width):
    experts, x, ends = experts_and_slots(TINY.replace(moe_intermediate_size=width, n_routed_experts=8))
    y, dx, dw = grouped(experts, x, ends, policy)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    bounds = [0, *ends.tolist()]
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        part = x[start:end].clone().requires_grad_()
        weight = experts.gate_up_proj[expert].detach().requires_grad_()
        alone = narrow_linear(part, weight, policy)
        alone.backward(dy[start:end])
        last_bit = 2.0**-7 if policy.outputs == "bf16" else 1e-5
        torch.testing.assert_close(y[start:end], alone.detach(), atol=1e-5, rtol=last_bit)
        torch.testing.assert_close(dx[start:end], part.grad, atol=1e-5, rtol=last_bit)
        torch.testing.assert_close(dw[expert], weight.grad, atol=1e-4, rtol=last_bit)


def test_without_slots_the_experts_answer_nothing_and_learn_nothing():
    experts, x, ends = experts_and_slots()
    y, dx, dw = grouped(experts, x[:0], ends * 0, V3)
    assert y.shape == (0, 128) and dx.shape == (0, 256) and not dw.any()


@pytest.mark.parametrize("policy", [V3, V3.replace(weights="tensor")], ids=["grouped", "apart"])
def test_autocast_takes_no_bits_of_the_experts(policy):
    experts, x, ends = experts_and_slots()
    plain = grouped(experts, x, ends, policy)
    with torch.autocast("cpu", torch.bfloat16):
        cast = grouped(experts, x, ends, policy)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(cast, plain, strict=True))


def test_plain_experts_multiply_as_before():
    experts, x, ends = experts_and_slots()
    assert torch.equal(experts.multiply(x, experts.gate_up_proj, ends), grouped_linear(x, experts.gate_up_proj, ends))


# The rest of the library goes on working ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, DENSE], ids=["experts", "dense"])
@pytest.mark.parametrize("policy", [V3, V3.replace(wide=())], ids=["V3", "all narrow"])
def test_generation_takes_the_way_of_the_narrow_model(config, policy):
    model = apply_policy(model_of(config), policy)
    assert type(step.decode_step(model, 1)) is step.ModelStep
    tokens = tokens_of(batch=1, length=12)
    with torch.inference_mode():
        caches = model.new_caches()
        by_one = torch.cat([model(tokens[:, i : i + 1], caches) for i in range(12)], dim=1)
        plain = apply_policy(copy.deepcopy(model), WIDE)(tokens)
        whole = model(tokens)
    assert (by_one - plain).norm() > 0.02 * plain.norm()
    if config is DENSE and policy.wide:  # elsewhere a code or a choice of experts may tip: sums run in another order
        torch.testing.assert_close(by_one, whole, atol=1e-4, rtol=1e-4)
    assert lab.generation.generate(model, tokens, 5).shape == (1, 17)


@pytest.mark.parametrize("policy", [V3, V3.replace(activations="tensor"), PrecisionPolicy(products="bf16")],
                         ids=["V3", "one scale", "bf16"])  # fmt: skip
def test_absorbed_attention_reads_the_narrow_weight_and_narrow_latents(policy):
    torch.manual_seed(5)
    plain = lab.attention.LatentAttention(TINY)
    plain.o_proj = (
        nn.Identity()
    )  # it rounds its input, and where a sum in another order tips a code, that is no mistake
    narrow = apply_policy(copy.deepcopy(plain), policy)
    x, positions = torch.randn(2, 40, 256), torch.arange(40)
    with torch.inference_mode():
        expanded, absorbed = (narrow(x, positions, absorb=absorb) for absorb in (False, True))
        wide = plain(x, positions)
    assert (expanded - wide).norm() > 1e-3 * wide.norm()
    assert (absorbed - expanded).norm() < 1e-5 * wide.norm()


def test_a_narrow_latent_model_writes_what_it_reads():
    """Sums run in another order, so a code may tip: 1e-4 of an answer. In one layer without experts no choice does."""
    model = apply_policy(model_of(TINY.replace(num_hidden_layers=1, first_k_dense_replace=1)), V3).eval()
    tokens = lab.generation.generate(model, tokens_of(batch=1, length=12), 8)
    with torch.inference_mode():
        whole, caches = model(tokens), model.new_caches()
        by_one = [model(tokens[:, :12], caches), *(model(tokens[:, i : i + 1], caches) for i in range(12, 20))]
    assert (torch.cat(by_one, dim=1) - whole).norm() < 2e-3 * whole.norm()
    assert tokens[:, 12:].tolist() == whole[:, 11:-1].argmax(-1).tolist()


def test_a_narrow_model_is_saved_and_loaded_like_any_other(tmp_path):
    model = apply_policy(model_of(), V3)
    lab.model.save_hf(model, tmp_path)
    loaded = lab.model.load_hf(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert torch.equal(apply_policy(loaded, V3)(tokens_of()), model(tokens_of()))


@pytest.mark.parametrize("policy", [V3, V3.replace(wide=()), PrecisionPolicy(products="bf16"),
                                    PrecisionPolicy(products="bf16", outputs="bf16")],
                         ids=["V3", "all narrow", "bf16", "bf16 alone"])  # fmt: skip
def test_a_narrow_model_learns(policy):
    text = lab.data.ByteTokenizer().encode("eight bits are enough, and here is why. " * 100)
    batches = lab.data.Batches(text, batch=4, length=32, seed=0)
    recipe = lab.training.Recipe(steps=25, warmup_steps=3)
    records = list(lab.training.train(apply_policy(model_of(), policy), batches, recipe))
    assert records[-1].loss < records[0].loss - 1.5


def test_a_run_that_resumes_in_eight_bits_goes_on_bit_for_bit(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    text = lab.data.ByteTokenizer().encode("eight bits are enough, and here is why. " * 100)
    batches, recipe = lab.data.Batches(text, 2, 24, 0), lab.training.Recipe(steps=6, warmup_steps=2)
    whole = [r.loss for r in lab.training.train(apply_policy(model_of(), V3), batches, recipe)]
    file, half = tmp_path / "run.safetensors", []
    run = lab.training.train(apply_policy(model_of(), V3), batches, recipe, checkpoint=file)
    for record in run:
        half.append(record.loss)
        if record.step == 2:
            break
    run.close()
    rest = lab.training.train(apply_policy(model_of(seed=9), V3), batches, recipe, checkpoint=file, resume=True)
    half += [record.loss for record in rest]
    torch.set_num_threads(threads)
    assert half == whole
