"""A token written by compiled kernels is the token that the model itself would write."""

import copy
import hashlib
import os
import pathlib
from types import SimpleNamespace

import pytest
import references
import torch
from scripts import run
from torch import nn

import deepseek_lab as lab
from deepseek_lab import generation
from deepseek_lab.generation import generate, step
from deepseek_lab.generation.step import CompiledStep, ModelStep, decode_step
from deepseek_lab.kernels import numba_attention, numba_decode, numba_rows

YARN = lab.RopeScaling("yarn", 4.0, 16, 32.0, 1.0, 0.707, 1.0)
V3 = lab.ModelConfig(
    vocab_size=97, hidden_size=40, intermediate_size=72, num_hidden_layers=3, num_attention_heads=3,
    num_key_value_heads=3, q_lora_rank=21, kv_lora_rank=18, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=7,
    n_routed_experts=12, n_shared_experts=1, num_experts_per_tok=3, moe_intermediate_size=22, first_k_dense_replace=1,
    n_group=4, topk_group=2, routed_scaling_factor=2.5, max_position_embeddings=600,
)  # fmt: skip
V2 = V3.replace(model_type="deepseek_v2", scoring_func="softmax", topk_method="group_limited_greedy",
                norm_topk_prob=False, n_shared_experts=2, routed_scaling_factor=4.0)  # fmt: skip
CONFIGS = {
    "v3 with groups": V3,
    "v3 in whole vectors": V3.replace(hidden_size=64, q_lora_rank=32, kv_lora_rank=16, v_head_dim=16,
                                      moe_intermediate_size=16),
    "v3 without groups": V3.replace(n_group=1, topk_group=1),
    "v3 without shared experts": V3.replace(n_shared_experts=0),
    "v3 with several dense layers": V3.replace(num_hidden_layers=4, first_k_dense_replace=3),
    "v3 without experts": V3.replace(n_routed_experts=None, n_shared_experts=0, num_experts_per_tok=0),
    "yarn with mscale": V3.replace(rope_scaling=YARN),
    "tied embeddings": V3.replace(tie_word_embeddings=True),
    "with modules": V3.replace(num_nextn_predict_layers=2),
    "v2 with groups": V2,
    "v2-lite": V2.replace(q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1),
}  # fmt: skip


@pytest.fixture(autouse=True)
def numba(monkeypatch):
    monkeypatch.setenv("LAB_KERNELS", "numba")


def filled(config, seed=0):
    return references.fill(lab.model.Transformer(config), seed).eval()


def by_the_model(model, tokens, count, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("LAB_KERNELS", "reference")
        return generate(model, tokens, count)


def bound(config) -> float:
    """How far two float32 evaluations may lie apart, as a share of the largest logit.

    A sum of n products is off by at most n u (u = 2^-24) of the sum of their sizes in any order, and by about sqrt(n) u
    as roundings have both signs (Higham and Mary 2019); two orders differ by twice that. A token passes no more than 12
    sums one after the other in a layer (three norms, six products of attention, three of the feed-forward network) and
    two at the end, and norms keep the size of what goes on. To first order: 2 sqrt(n) u (12 layers + 2), n the longest.
    Over 200 random models the largest difference of 40 tokens was 1 to 8 % of this.
    """
    c = config
    longest = max(c.hidden_size, c.intermediate_size, c.num_attention_heads * c.v_head_dim, 40)
    return 2 * longest**0.5 * 2**-24 * (12 * c.num_hidden_layers + 2)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_chosen_experts_are_the_models_for_forty_tokens(name, batch):
    model = filled(CONFIGS[name])
    fast, slow = decode_step(model, batch), ModelStep(model)
    assert type(fast) is CompiledStep
    caches = [model.new_caches(batch, capacity=3) for _ in range(2)]  # grows to 6, 12, 24 and 48
    for tokens in references.token_ids(batch, 40).unbind(1):
        expected = slow(tokens, caches[1])
        load = [layer.load for layer in model.expert_layers()]
        got = fast(tokens, caches[0])
        assert references.difference(got, expected) < bound(model.config)
        for layer, counted in zip(model.expert_layers(), load, strict=True):
            assert torch.equal(layer.load, counted)
    for ours, theirs in zip(*caches, strict=True):
        assert (ours.length, ours.allocated_nbytes) == (theirs.length, theirs.allocated_nbytes)
        assert references.difference(ours.view()[0], theirs.view()[0]) < bound(model.config)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_read_together_have_every_bit_of_tokens_read_one_by_one(name, count):
    model, tokens = filled(CONFIGS[name]), references.token_ids(1, 20)
    fast, slow = decode_step(model, 1), ModelStep(model)
    together, alone, torchs = (model.new_caches(1, capacity=3) for _ in range(3))
    for part in tokens.split(count, dim=1):
        logits, states = fast.read(part, together)
        single = [fast.read(token, alone) for token in part.split(1, dim=1)]
        assert torch.equal(logits, torch.cat([each[0] for each in single], dim=1))
        assert torch.equal(states, torch.cat([each[1] for each in single], dim=1))
        for got, expected in zip((logits, states), slow.read(part, torchs), strict=True):
            assert references.difference(got, expected) < bound(model.config)
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours.view()[0], theirs.view()[0])
    with pytest.raises(ValueError, match="expected one of each text"):
        fast.read(references.token_ids(2, 2), model.new_caches(2))


def test_modules_read_on_as_the_models_own_do():
    model, tokens = filled(CONFIGS["with modules"]), references.token_ids(1, 30)
    fast, slow = decode_step(model, 1), ModelStep(model)
    states = torch.randn(1, 30, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    ours, theirs = (model.new_caches(1, multi_token=True) for _ in range(2))
    for start, end in ((0, 1), (1, 4), (4, 6), (6, 9)):
        before = slow_before = states[:, start:end]
        for index in range(2):
            got, before = fast.draft(index, before, tokens[:, start:end], ours[index])
            expected, slow_before = slow.draft(index, slow_before, tokens[:, start:end], theirs[index])
            assert references.difference(got, expected) < bound(model.config)
            assert references.difference(before[:, -1:], slow_before[:, -1:]) < bound(model.config)
            assert references.difference(ours[index].view()[0], theirs[index].view()[0]) < bound(model.config)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_tiny_model_writes_the_same_128_tokens(batch, monkeypatch):
    torch.manual_seed(3)
    model = lab.model.Transformer(lab.PRESETS["tiny"]).eval()
    tokens = torch.randint(256, (batch, 20))
    assert torch.equal(generate(model, tokens, 128), by_the_model(model, tokens, 128, monkeypatch))


def test_the_shipped_model_writes_the_same_128_tokens(monkeypatch):
    if not lab.checkpoints.directory("tiny").is_dir():
        pytest.skip("the checkpoint is not made yet: python -m deepseek_lab.checkpoints")
    model = lab.checkpoints.load("tiny")
    tokens = torch.randint(256, (1, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(generate(model, tokens, 128), by_the_model(model, tokens, 128, monkeypatch))


def test_positions_far_beyond_the_first_table_turn_as_in_the_model():
    model = filled(V3.replace(rope_scaling=YARN))
    caches = [model.new_caches(1) for _ in range(2)]
    tokens = references.token_ids(1, 516)
    for each in caches:
        model(tokens[:, :-4], each)
    fast, slow = decode_step(model, 1), ModelStep(model)
    for token in tokens[:, -4:].unbind(1):
        assert references.difference(fast(token, caches[0]), slow(token, caches[1])) < bound(model.config)


@pytest.mark.parametrize("config", [V3, V2], ids=["v3", "v2"])
def test_equal_scores_go_to_the_lower_index(config):
    model = filled(config)
    for layer in model.expert_layers():
        nn.init.zeros_(layer.gate.weight)
        if config is V3:
            nn.init.zeros_(layer.gate.e_score_correction_bias)
    for one in (decode_step(model, 1), ModelStep(model)):  # torch's own topk took experts 9 to 12 of 16 zeros
        one(torch.tensor([5]), model.new_caches(1))
        for layer in model.expert_layers():
            assert layer.load.tolist() == [1, 1, 1] + [0] * 9


@pytest.mark.parametrize("config", [V3, V2, V3.replace(n_group=1, topk_group=1)], ids=["v3", "v2", "no groups"])
@pytest.mark.parametrize("expert", [0, 7])
def test_a_score_that_is_no_number_shows_in_the_logits(config, expert):
    model = filled(config)
    model.expert_layers()[-1].gate.weight.data[expert] = float("nan")  # between layers the caches refuse it
    for one in (decode_step(model, 1), ModelStep(model)):
        assert one(torch.tensor([5]), model.new_caches(1)).isnan().all()


@pytest.mark.parametrize("config", [V3, V2], ids=["v3", "v2"])
def test_which_of_two_equal_experts_is_chosen_does_not_show(config):
    model = filled(config)
    for layer in model.expert_layers():  # three choices among pairs of twins: the last one meets a tie
        for tensor in (*layer.gate.parameters(), *layer.gate.buffers(), *layer.experts.parameters()):
            tensor.data[1::2] = tensor.data[::2]
    fast, slow = decode_step(model, 1), ModelStep(model)
    caches = [model.new_caches(1) for _ in range(2)]
    for token in references.token_ids(1, 20).unbind(1):
        assert references.difference(fast(token, caches[0]), slow(token, caches[1])) < bound(config)


def test_a_bias_that_only_reorders_the_chosen_leaves_every_bit_of_the_logits():
    model, logits, token = filled(V3.replace(n_group=1, topk_group=1, num_experts_per_tok=6)), [], torch.tensor([5])
    for few in ([10, 20, 30, 40, 50, 60], [60, 10, 50, 20, 40, 30]):  # always the first six
        for layer in model.expert_layers():
            layer.gate.e_score_correction_bias.copy_(torch.tensor([*few, *[-10.0] * 6]))
        one = decode_step(model, 1)
        assert type(one) is CompiledStep
        logits.append(one(token, model.new_caches(1)).clone())
    assert torch.equal(*logits)


def test_a_training_step_shows_at_once(monkeypatch):
    model, tokens = filled(V3), references.token_ids(1, 9)
    before = generate(model, tokens, 40)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(tokens).square().sum().backward()
    optimizer.step()
    after = generate(model, tokens, 40)
    assert not torch.equal(after, before)
    assert torch.equal(after, by_the_model(model, tokens, 40, monkeypatch))


@pytest.mark.parametrize("move", [
    lambda model: model.double(),
    lambda model: setattr(model.lm_head.weight, "data", model.lm_head.weight.data.flip(0)),
], ids=["another dtype", "another tensor"])  # fmt: skip
def test_weights_that_move_between_two_streamed_tokens_are_noticed(move, monkeypatch):
    texts = []
    for kernels in ("numba", "reference"):
        monkeypatch.setenv("LAB_KERNELS", kernels)
        model = filled(V3)
        stream = generate(model, references.token_ids(1, 5), 20, stream=True)
        first = [next(stream) for _ in range(5)]
        move(model)
        texts.append(torch.stack(first + list(stream)))
    assert torch.equal(*texts)


class Louder(nn.Linear):
    """A learner's own layer."""

    def forward(self, x):
        return 2 * super().forward(x)


def louder(model):
    model.layers[1].self_attn.o_proj.__class__ = Louder


def silenced(model):
    model.layers[2].mlp.register_forward_hook(lambda module, inputs, output: 0 * output)


def replaced(model):
    model.layers[0].mlp.forward = torch.zeros_like


def regrouped(model):
    gate = model.layers[1].mlp.gate
    gate.config = gate.config.replace(topk_group=1)


def transposed(model):
    weight = model.layers[0].mlp.down_proj.weight
    weight.data = weight.data.T.contiguous().T


def halved(model):
    attention = model.layers[0].self_attn
    attention.rotate = lab.attention.rope.rotate_halves


def dropping(model):
    for layer in model.train().expert_layers():
        layer.capacity_factor = 0.5


@pytest.mark.parametrize("change", [louder, silenced, replaced, regrouped, transposed, halved, dropping])
def test_what_the_kernels_do_not_know_takes_the_models_own_path(change, monkeypatch):
    model, tokens = filled(V3), references.token_ids(1, 5)
    change(model)
    assert type(decode_step(model, 1)) is ModelStep
    assert torch.equal(generate(model, tokens, 20), by_the_model(model, tokens, 20, monkeypatch))


def test_other_models_dtypes_and_sizes_take_the_models_own_path():
    llama = lab.ModelConfig(model_type="llama", vocab_size=50, hidden_size=32, intermediate_size=48,
                            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model = filled(V3)
    assert type(decode_step(filled(llama), 1)) is ModelStep
    assert type(decode_step(filled(V3.replace(rope_interleave=False)), 1)) is ModelStep
    assert type(decode_step(copy.deepcopy(model).bfloat16(), 1)) is ModelStep
    assert type(decode_step(model, step.LARGEST_WORK // V3.hidden_size**2 + 1)) is ModelStep
    with torch.autocast("cpu", torch.bfloat16):
        assert type(decode_step(model, 1)) is ModelStep
    assert type(decode_step(model, 1)) is CompiledStep


def test_the_environment_chooses_the_body(monkeypatch):
    assert lab.kernels.active() == "numba"
    monkeypatch.setenv("LAB_KERNELS", "reference")
    assert lab.kernels.active() == "reference"
    assert lab.kernels.body() is None
    assert type(decode_step(filled(V3), 1)) is ModelStep
    monkeypatch.setenv("LAB_KERNELS", "fast")
    with pytest.raises(ValueError, match="LAB_KERNELS='fast' is unknown; choose reference, numba, cuda"):
        lab.kernels.active()
    monkeypatch.delenv("LAB_KERNELS")
    assert lab.kernels.active() == "numba"


def test_what_would_write_out_of_bounds_is_refused():
    model = filled(V3)
    fast, token = decode_step(model, 1), torch.tensor([5])
    caches = model.new_caches(1)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        fast(torch.tensor([97]), caches)
    with pytest.raises(ValueError, match="expected \\[batch\\]"):
        fast(token[:, None], caches)
    with pytest.raises(ValueError, match="new_caches\\(batch=2\\)"):
        fast(torch.tensor([5, 6]), caches)
    with pytest.raises(ValueError, match="expected a float32 LatentCache of length 0"):
        fast(token, model.new_caches(1)[:-1] + filled(V3).bfloat16().new_caches(1)[:1])
    assert [cache.length for cache in caches] == [0, 0, 0]
    full = model.new_caches(1)
    model(references.token_ids(1, 600), full)
    with pytest.raises(ValueError, match="max_position_embeddings=600"):
        fast(token, full)


def test_an_interrupted_step_leaves_no_half_token():
    model = filled(V3)
    fast = decode_step(model, 1)
    token, caches = torch.tensor([5]), model.new_caches(1)
    expected = fast(token, model.new_caches(1))
    kernels = fast._kernels

    def interrupt(*arrays):
        raise KeyboardInterrupt

    fast._kernels = SimpleNamespace(attention=kernels.attention, logits=interrupt)
    with pytest.raises(KeyboardInterrupt):
        fast(token, caches)
    assert [cache.length for cache in caches] == [0, 0, 0]
    fast._kernels = kernels
    assert torch.equal(fast(token, caches), expected)


def test_compiling_ahead_leaves_nothing_to_compile(tmp_path):
    """One signature per kernel, whatever the config: what the installer compiles is all that is ever needed."""
    assert "ready after" in run("from deepseek_lab.kernels.__main__ import main; main()", NUMBA_CACHE_DIR=str(tmp_path))
    kernels = lab.kernels.body()
    for name in ("v3 with groups", "v2-lite", "v3 without shared experts"):
        model = filled(CONFIGS[name])
        decode_step(model, 3)(torch.tensor([1, 2, 3]), model.new_caches(3))
    model = filled(CONFIGS["with modules"])
    generation.speculate(model, references.token_ids(1, 5), 9)
    for name in ("absorb", "add_values", "dense", "experts", "join", "logits"):
        assert len(getattr(kernels, name).signatures) == 1
    assert len(list(tmp_path.rglob("numba_decode.*.nbc"))) == 6
    assert len(list(tmp_path.rglob("numba_product.multiply-*.nbc"))) == 1


def test_the_kernels_are_compiled_anew_when_what_they_call_has_changed():
    """Numba's cache looks at the file of a kernel alone, so that file names the hash of what it imports."""
    sources = b"".join(pathlib.Path(file.__file__).read_bytes() for file in (numba_rows, numba_attention))
    found = hashlib.sha256(sources).hexdigest()
    assert found.startswith(numba_decode.IMPORTED), "put the new hash in numba_decode.py"


def test_importing_the_model_and_generation_does_not_import_numba():
    script = "import sys, deepseek_lab as lab; lab.model, lab.generation, lab.kernels; print('numba' in sys.modules)"
    assert run(script).strip() == "False"


def test_every_index_is_in_bounds(tmp_path):
    """The same step with Numba's bounds check on, which a call that is wrong on purpose shows to be on."""
    here = os.path.dirname(__file__)
    script = f"""
import sys
sys.path[:0] = {[os.path.dirname(here), here]!r}
import numpy as np, torch, test_decode_step as t
from deepseek_lab.kernels import body
try:
    body().logits(np.ones((1, 1), np.float32), np.ones(2, np.float32), 1e-6, np.ones((3, 2), np.float32))
    print("no bounds check")
except IndexError:
    for name in ("v3 with groups", "v2-lite"):
        model = t.filled(t.CONFIGS[name])
        caches = [model.new_caches(2, capacity=1) for _ in range(2)]
        fast, slow = t.decode_step(model, 2), t.ModelStep(model)
        for token in t.references.token_ids(2, 5).unbind(1):
            worst = t.references.difference(fast(token, caches[0]), slow(token, caches[1]))
            assert type(fast) is t.CompiledStep and worst < t.bound(model.config)
    print("in bounds")
"""
    found = run(script, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path), LAB_KERNELS="numba")
    assert found.strip() == "in bounds"
