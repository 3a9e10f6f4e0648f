"""Recomputation: the same bits, less memory, whatever is named, in every arithmetic and for every kind of layer."""

import copy
import itertools
import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import deepseek_lab as lab
from deepseek_lab.accounting.measured import record_step
from deepseek_lab.model.layer import Layer
from deepseek_lab.model.recompute import RECOMPUTABLE
from deepseek_lab.precision import PrecisionPolicy, fast_bf16

TINY = lab.PRESETS["tiny"]
SMALL = TINY.replace(num_hidden_layers=2, hidden_size=128)
LITE = lab.PRESETS["deepseek-v2-lite"].replace(
    vocab_size=260, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, intermediate_size=128, moe_intermediate_size=24,
    n_routed_experts=8, num_experts_per_tok=3, rope_scaling=None, max_position_embeddings=256,
)  # fmt: skip
DENSE = lab.PRESETS["qwen2.5-72b"].replace(
    vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
SUBSETS = [set(names) for count in range(4) for names in itertools.combinations(RECOMPUTABLE, count)]
TOKENS = torch.randint(0, 260, (20_000,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of(config=SMALL, products="fp32"):
    torch.manual_seed(0)
    model = lab.model.Transformer(config)
    rules = {"products": "bf16", "outputs": "bf16"} if products == "bf16 alone" else {"products": products}
    return lab.model.apply_policy(model, PrecisionPolicy(**rules))


def gradients(model, recompute=(), batch=None):
    model.recompute = recompute
    model.zero_grad(set_to_none=True)
    loss = lab.training.loop.next_token_loss(model, TOKENS[:130].view(2, 65) if batch is None else batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("config", [SMALL, LITE, DENSE], ids=["V3", "V2-Lite", "dense"])
@pytest.mark.parametrize("products", ["fp32", "bf16", "fp8", "bf16 alone"])
def test_every_choice_gives_the_same_gradients_bit_for_bit(config, products):
    model = model_of(config, products)
    plain = gradients(model)
    assert not same(plain, gradients(model, batch=TOKENS[200:330].view(2, 65)))
    for names in SUBSETS:
        assert same(plain, gradients(model, names)), names


def test_a_model_in_double_precision_and_few_tokens_too():
    """Attention then runs step by step, and a token or two takes the short way through its experts where it may."""
    model = model_of().double()
    for batch in (TOKENS[:20].view(2, 10), TOKENS[:3].view(1, 3)):
        assert same(gradients(model, (), batch), gradients(model, RECOMPUTABLE, batch))


def test_padding_and_a_capacity_that_drops_change_nothing_of_that():
    model, hidden = model_of().train(), torch.zeros(2, 64, dtype=torch.bool)
    hidden[1, :9] = True
    for layer in model.expert_layers():
        layer.capacity_factor = 0.8
    found = []
    for names in ((), RECOMPUTABLE):
        model.recompute = names
        model.zero_grad(set_to_none=True)
        model(TOKENS[:128].view(2, 64), hidden=hidden).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
        assert all(layer.dropped > 0 for layer in model.expert_layers())
    assert same(*found)


@pytest.mark.parametrize("products", ["fp32", "fp8"])
def test_a_run_with_balance_losses_is_the_same_run(products):
    recipe = lab.training.Recipe(steps=4, warmup_steps=1, sequence_loss=0.01, device_loss=0.05)
    runs = []
    for names in ((), RECOMPUTABLE):
        model = model_of(products=products)
        model.recompute = names
        records = list(lab.training.train(model, lab.data.Batches(TOKENS, 2, 48), recipe))
        runs.append(([r.loss for r in records], [r.gradient_norm for r in records], [r.load.tolist() for r in records]))
        assert all(record.balance_loss > 0 for record in records)
    assert runs[0] == runs[1]


def test_a_loss_of_the_routers_alone_has_its_gradient():
    """Nothing flows through the layers' outputs then, so what was kept is not handed back and all is computed anew."""
    model, found = model_of(), []
    for names in ((), RECOMPUTABLE):
        model.recompute, heard = names, []
        model.zero_grad(set_to_none=True)
        hook = model.layers[1].mlp.gate.register_forward_hook(lambda *seen, heard=heard: heard.append(seen[2].scores))
        model(TOKENS[:64].view(1, 64))
        hook.remove()
        heard[0].square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 10 and same(*found)


def test_two_backward_passes_through_one_graph_add_up():
    model = model_of()
    once = gradients(model, RECOMPUTABLE)[1:]
    once = [g.clone() for g in once]
    model.zero_grad(set_to_none=True)
    loss = lab.training.loop.next_token_loss(model, TOKENS[:130].view(2, 65))
    loss.backward(retain_graph=True)
    assert same(once, [p.grad for p in model.parameters()])
    loss.backward()
    assert same([2 * g for g in once], [p.grad for p in model.parameters()])


def test_a_first_pass_that_still_has_to_choose_its_arithmetic_is_no_other():
    """Which products are faster is measured once, in the first pass: those trial products are not the model's."""
    model = model_of(products="bf16 alone")
    fast_bf16.cache_clear()
    again = gradients(model, RECOMPUTABLE)
    assert same(again, gradients(model))


def test_hooks_may_change_what_passes_and_draw_random_numbers():
    model, found = model_of(), []
    model.layers[0].self_attn.q_a_proj.register_forward_hook(lambda *seen: torch.nn.functional.dropout(seen[2], 0.3))
    model.layers[1].mlp.shared_experts.gate_proj.register_forward_hook(lambda *seen: 2 * seen[2])
    for names in SUBSETS:
        torch.manual_seed(1)
        found.append([*gradients(model, names), torch.rand(3)])
    assert all(same(found[0], other) for other in found[1:])


def test_a_hook_that_changes_a_kept_product_in_place_is_refused():
    model = model_of()
    model.layers[0].self_attn.q_a_proj.register_forward_hook(lambda *seen: seen[2].mul_(2))
    gradients(model)
    with pytest.raises(RuntimeError, match=r"keeps for the gradient is changed in place.* set model.recompute = \(\)"):
        gradients(model, {"norms"})


@pytest.mark.parametrize("change", ["a step", "the bias of a router", "other weights for one call"])
def test_weights_that_moved_before_the_gradient_came_are_refused(change):
    """Without recomputation torch refuses a step there too; here the second pass would read other weights."""
    model = model_of()
    model.recompute, tokens = RECOMPUTABLE, (TOKENS[:64].view(1, 64),)
    others = {name: 2 * p.detach() for name, p in model.named_parameters()} if "call" in change else {}
    loss = torch.func.functional_call(model, {n: p.requires_grad_() for n, p in others.items()}, tokens).square().mean()
    with torch.no_grad():
        if change == "a step":
            model.layers[0].input_layernorm.weight.mul_(2)
        elif not others:
            model.layers[1].mlp.gate.e_score_correction_bias.add_(1)
    with pytest.raises(RuntimeError, match=r"weights have changed since .* call backward\(\) before they move"):
        loss.backward()


def test_the_load_stays_that_of_the_last_forward_pass():
    model = model_of()
    model.recompute, layer = RECOMPUTABLE, model.expert_layers()[0]
    loss = lab.training.loop.next_token_loss(model, TOKENS[:130].view(2, 65))
    with torch.no_grad():
        model(TOKENS[500:530].view(1, 30))
    load = layer.load
    loss.backward()
    assert torch.equal(layer.load, load)


def test_another_thread_in_the_same_model_changes_nothing():
    """It is inside a module whose results are not kept while this thread makes one that is."""
    model, main, inside, leave, others = model_of(), threading.get_ident(), threading.Event(), threading.Event(), []
    plain, attention = gradients(model), model.layers[0].self_attn

    def begin(*_):
        if threading.get_ident() == main and not others:
            read = torch.no_grad()(lambda: model(TOKENS[:64].view(1, 64)))
            others.append(threading.Thread(target=read))
            others[0].start()
            inside.wait(10)

    def end(*_):
        if threading.get_ident() == main and not leave.is_set():
            leave.set()
            others[0].join()

    def stay(*_):
        if threading.get_ident() != main:
            inside.set()
            leave.wait(10)

    attention.kv_a_proj_with_mqa.register_forward_pre_hook(begin)
    attention.kv_a_proj_with_mqa.register_forward_hook(end)
    attention.kv_b_proj.register_forward_hook(stay)
    again = gradients(model, RECOMPUTABLE)
    assert leave.is_set() and same(plain, again)


def test_gradients_of_gradients_are_the_same():
    model, found = model_of(SMALL.replace(hidden_size=64)), []
    for names in ((), RECOMPUTABLE):
        model.recompute = names
        model.zero_grad(set_to_none=True)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = lab.training.loop.next_token_loss(model, TOKENS[:34].view(2, 17))
            first = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
            sum(g.square().sum() for g in first).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 20 and same(*found)


def step_of(recompute, config=TINY, batch=4, length=512):
    """A model, and the next step of its training; moments exist."""
    model = model_of(config)
    model.recompute = recompute
    run = lab.training.train(model, lab.data.Batches(TOKENS, batch, length), lab.training.Recipe(steps=9))
    next(run)
    return model, lambda: next(run)


def test_the_tiny_models_step_peaks_at_little_more_than_half():
    kept, again = (record_step(*step_of(names)).peak.total for names in ((), RECOMPUTABLE))
    assert again <= 0.55 * kept
    print(f"peak {kept:,} bytes, recomputed {again:,}: {again / kept:.3f}")


def test_torchs_own_count_of_allocations_falls_as_well(monkeypatch):
    """With kernels in torch, so that no bytes are numpy's. Weights and moments stand before."""
    monkeypatch.setenv("LAB_KERNELS", "reference")
    peaks = []
    for names in ((), RECOMPUTABLE):
        model, step = step_of(names)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        peaks.append(max(itertools.accumulate(sizes)) + 12 * sum(p.numel() for p in model.parameters()))
    assert peaks[1] <= 0.6 * peaks[0]


def test_each_name_lowers_what_is_kept_by_itself_and_all_together_most():
    def kept(names):
        return record_step(*step_of(names, SMALL, 2, 64)).largest("activations")

    nothing, everything = kept(()), kept(RECOMPUTABLE)
    alone = [kept({name}) for name in RECOMPUTABLE]
    assert all(everything < one < 0.9 * nothing for one in alone)


def test_the_switch_reaches_every_layer_and_is_copied_with_the_model():
    model = model_of(SMALL.replace(num_nextn_predict_layers=1))
    assert model.recompute == frozenset()
    model.recompute = ["norms", "swiglu"]
    other = copy.deepcopy(model)
    layers = [module for m in (model, other) for module in m.modules() if isinstance(module, Layer)]
    assert len(layers) == 6
    assert {layer.recompute for layer in layers} == {model.recompute} == {frozenset({"norms", "swiglu"})}
    model.recompute = ()
    assert other.recompute and not model.recompute and not model.layers[0].recompute


def test_nothing_is_computed_again_without_gradients_or_with_caches():
    model = model_of()
    plain, passes = model(TOKENS[:24].view(1, 24)), []
    model.recompute = RECOMPUTABLE
    model.layers[0].input_layernorm.register_forward_hook(lambda *_: passes.append(1))
    caches = model.new_caches()
    cached = model(TOKENS[:24].view(1, 24), caches)
    assert caches[0].length == 24
    cached.sum().backward()
    assert len(passes) == 1 and caches[0].length == 24
    with torch.no_grad():
        assert torch.equal(model(TOKENS[:24].view(1, 24)), plain)
    assert len(passes) == 2


@pytest.mark.parametrize(("names", "error", "words"), [
    ("norms", TypeError, "pass a set of names"), (None, TypeError, "pass a set of names"),
    ({"attention"}, ValueError, "recompute has 'attention'; choose among norms, up-projections, swiglu"),
])  # fmt: skip
def test_what_cannot_be_recomputed_is_refused_and_the_switch_stays(names, error, words):
    model = model_of()
    model.recompute = {"swiglu"}
    with pytest.raises(error, match=words):
        model.recompute = names
    assert model.recompute == {"swiglu"}


def test_no_hook_stays_behind_even_after_an_error():
    model = model_of()
    model.recompute = RECOMPUTABLE
    with pytest.raises(ZeroDivisionError):
        handle = model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
        model(TOKENS[:24].view(1, 24))
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert same(gradients(model, RECOMPUTABLE), gradients(model))
