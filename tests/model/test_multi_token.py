"""Prediction modules: the published equations, the published implementation, the published files."""

import json

import pytest
import references
import torch
import torch.nn.functional as F
from references import difference, token_ids
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_layers import MtpModel

import deepseek_lab as lab
from deepseek_lab.accounting import checkpoint_elements, parameters, weights
from deepseek_lab.model import Transformer, load_hf, multi_token_logits, multi_token_loss, save_hf, weighted_loss
from deepseek_lab.model.layer import Layer

EXACT = 1e-5
SMALL = lab.PRESETS["tiny"].replace(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                    num_key_value_heads=2, intermediate_size=40, moe_intermediate_size=16,
                                    num_nextn_predict_layers=2)  # fmt: skip
# No width is a multiple of 128 and most need two blocks: the edges of the blocks are ragged.
RAGGED = SMALL.replace(hidden_size=136, intermediate_size=150, moe_intermediate_size=130, n_routed_experts=4, n_group=2,
                       num_experts_per_tok=2, topk_group=1, kv_lora_rank=131, q_lora_rank=129)  # fmt: skip


def filled(config=SMALL, seed: int = 0) -> Transformer:
    return references.fill(Transformer(config), seed).eval()


def same(a: Transformer, b: Transformer) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def by_equations(model: Transformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Equations 21 to 23, one token and one depth at a time, from the state dict; the block is the model's own."""
    state, c = model.state_dict(), model.config

    def norm(x, name):
        return x / (x.square().mean() + c.rms_norm_eps).sqrt() * state[name]

    _, h = model.read(tokens)
    depths = []
    for k in range(1, c.num_nextn_predict_layers + 1):
        prefix = f"multi_token.{k - 1}."
        projected = torch.zeros(len(tokens), tokens.shape[1] - k, c.hidden_size)
        for row, text in enumerate(tokens):
            for i in range(tokens.shape[1] - k):
                embedded = norm(state["embed_tokens.weight"][text[i + k]], prefix + "enorm.weight")
                before = norm(h[row, i], prefix + "hnorm.weight")
                # [embedding; hidden], as in the released weights
                matrix = state[prefix + "eh_proj.weight"]
                projected[row, i] = matrix[:, : c.hidden_size] @ embedded + matrix[:, c.hidden_size :] @ before
        block = Layer(c, c.num_hidden_layers)
        block.load_state_dict({n: state[prefix + n] for n in block.state_dict()})
        out = block(projected, torch.arange(tokens.shape[1] - k))
        h = torch.stack([torch.stack([norm(x, prefix + "shared_head.norm.weight") for x in text]) for text in out])
        depths.append(h @ state["lm_head.weight"].T)
    return depths


@pytest.fixture
def model():
    return filled()


@torch.no_grad()
def equals_the_equations(model) -> bool:
    tokens = token_ids(2, 11)
    got, expected = multi_token_logits(model, tokens), by_equations(model, tokens)
    assert len(got) == 1 + len(expected)
    assert torch.equal(got[0], model(tokens))
    return all(difference(a, b) < EXACT for a, b in zip(got[1:], expected, strict=True))


@pytest.mark.parametrize("change", [{}, dict(num_nextn_predict_layers=1), dict(first_k_dense_replace=0),
                                    dict(n_routed_experts=None, n_shared_experts=0, num_experts_per_tok=0),
                                    dict(tie_word_embeddings=True), dict(rms_norm_eps=0.1)])  # fmt: skip
def test_logits_of_every_depth_are_those_of_the_published_equations(change):
    assert equals_the_equations(filled(SMALL.replace(**change)))


def test_hidden_state_and_embedding_in_the_papers_order_are_caught(model):
    """The paper writes [hidden; embedding]; with the released weights that is a wrong model that still runs."""
    for module in model.multi_token:
        module.eh_proj.forward = lambda x, module=module: F.linear(torch.cat(x.chunk(2, -1)[::-1], -1),
                                                                   module.eh_proj.weight)  # fmt: skip
    assert not equals_the_equations(model)


def test_a_forgotten_last_norm_is_caught(model):
    for module in model.multi_token:
        module.shared_head["norm"] = nn.Identity()
    with pytest.raises((AssertionError, KeyError)):
        assert equals_the_equations(model)


# The published implementation ---------------------------------------------------------------------------------------


def published(depth: int, seed: int = 0, **changes):
    """A published model and its prediction modules, every tensor filled."""
    reference = references.build("deepseek_v3", seed, num_mtp_layers=depth, **changes)
    modules = references.fill(MtpModel(reference, depth), seed + 1).eval()
    return reference, modules


@torch.no_grad()
def published_depths(reference, modules, tokens) -> list[torch.Tensor]:
    """Logits of every depth by the published modules, each reading the whole text at once."""
    states = reference.model(input_ids=tokens, use_cache=False).last_hidden_state
    depths = []
    for k in range(1, modules.num_mtp_layers + 1):
        positions = torch.arange(k, tokens.shape[1])[None]
        states = modules.forward_layer(k - 1, states[:, :-1], positions, None, input_ids=tokens[:, k:])
        depths.append(modules._project_to_logits(states))
    return depths


def loaded_with(modules, model: Transformer) -> Transformer:
    """Our model with the published modules' tensors, name by name."""
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in modules.state_dict().items():
            if name.startswith("layers."):
                name = name.replace("layers.", "multi_token.").replace(".mtp_block", "")
                state[name.replace(".post_norm.", ".shared_head.norm.")].copy_(tensor)
    return model


@pytest.mark.parametrize("changes", [{}, dict(rope_parameters=references.yarn()), dict(q_lora_rank=None)])
@pytest.mark.parametrize("depth", [1, 2])
def test_logits_equal_those_of_the_published_modules(depth, changes, tmp_path):
    reference, modules = published(depth, **changes)
    model = references.ours(reference, tmp_path)
    model = loaded_with(modules, filled(model.config.replace(num_nextn_predict_layers=depth)))
    main = references.ours(reference, tmp_path).state_dict()
    model.load_state_dict(main, strict=False)
    tokens = token_ids(1, 23)
    with torch.no_grad():
        got = multi_token_logits(model, tokens)
    assert difference(got[0], references.published_logits(reference, tokens)) < EXACT
    for ours, theirs in zip(got[1:], published_depths(reference, modules, tokens), strict=True):
        assert difference(ours, theirs) < EXACT


def test_the_published_implementation_reads_the_modules_from_our_files(tmp_path):
    reference, _ = published(2)
    config = references.ours(reference, tmp_path / "theirs").config.replace(num_nextn_predict_layers=2)
    model = filled(config, seed=5)
    save_hf(model, tmp_path / "ours", max_shard_bytes=60_000)
    read = type(reference).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    read._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3.*", r"model\.layers\.4.*"]  # it expects V3's 61
    modules, tokens = MtpModel.from_pretrained(read).eval(), token_ids(1, 23)
    with torch.no_grad():
        got = multi_token_logits(model, tokens)
    for ours, theirs in zip(got[1:], published_depths(read, modules, tokens), strict=True):
        assert difference(ours, theirs) < EXACT


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 30_000])
@pytest.mark.parametrize("tied", [False, True])
def test_modules_come_back_bit_for_bit(tied, max_shard_bytes, tmp_path):
    model = filled(SMALL.replace(tie_word_embeddings=tied))
    save_hf(model, tmp_path, max_shard_bytes=max_shard_bytes)
    again = load_hf(tmp_path)
    assert again.config == model.config and same(again, model)
    assert (again.lm_head.weight is again.embed_tokens.weight) == tied


def test_files_name_the_modules_as_further_layers_and_repeat_embedding_and_head(model, tmp_path):
    save_hf(model, tmp_path, "bf16")
    stored = load_file(tmp_path / "model.safetensors")
    for layer in (2, 3):
        names = {n.removeprefix(f"model.layers.{layer}.") for n in stored if n.startswith(f"model.layers.{layer}.")}
        assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "embed_tokens.weight",
                "shared_head.head.weight", "self_attn.kv_b_proj.weight", "mlp.experts.15.up_proj.weight",
                "input_layernorm.weight"} <= names  # fmt: skip
        assert torch.equal(stored[f"model.layers.{layer}.embed_tokens.weight"], stored["model.embed_tokens.weight"])
        assert torch.equal(stored[f"model.layers.{layer}.shared_head.head.weight"], stored["lm_head.weight"])
    up = stored["model.layers.3.mlp.experts.5.up_proj.weight"].float()
    assert torch.equal(up, model.multi_token[1].mlp.experts.gate_up_proj[5].chunk(2)[1].bfloat16().float())


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 100_000])
def test_fp8_files_keep_what_the_released_ones_keep(max_shard_bytes, tmp_path):
    model = filled(RAGGED)
    save_hf(model, tmp_path, "fp8", max_shard_bytes)
    stored = {name: t for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()}
    for layer in (2, 3):
        for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "embed_tokens", "shared_head.head", "mlp.gate"):
            assert stored[f"model.layers.{layer}.{name}.weight"].dtype == torch.bfloat16
        name = f"model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"
        assert stored[name].dtype == torch.float8_e4m3fn
        codes, scales = stored[name].float(), stored[name + "_scale_inv"]
        expected = codes * scales.repeat_interleave(128, 0)[: len(codes)].repeat_interleave(128, 1)[:, : codes.shape[1]]
        got = load_hf(tmp_path).multi_token[layer - 2].self_attn.kv_a_proj_with_mqa.weight
        assert torch.equal(got, expected)


def test_bytes_and_elements_of_the_files_are_those_predicted(tmp_path):
    for dtype in ("fp32", "bf16", "fp8"):
        save_hf(filled(RAGGED), tmp_path, dtype)
        stored = load_file(tmp_path / "model.safetensors")
        assert sum(t.nbytes for t in stored.values()) == weights(RAGGED, dtype, with_mtp=True).total
    elements = checkpoint_elements(RAGGED, with_mtp=True)
    assert sum(t.numel() for t in stored.values()) == elements.total
    assert sum(t.numel() for t in stored.values() if t.dtype == torch.float8_e4m3fn) == elements["F8_E4M3"].total


@pytest.mark.parametrize("name", ["deepseek-v3", "tiny"])
def test_a_model_with_modules_has_the_predicted_parameters(name):
    config = lab.PRESETS[name].replace(num_nextn_predict_layers=2)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(t.numel() for t in model.state_dict().values()) == parameters(config, with_mtp=True).total


@pytest.mark.parametrize("name", ["embed_tokens", "shared_head.head"])
def test_a_module_with_a_table_of_its_own_is_refused(name, model, tmp_path):
    save_hf(model, tmp_path)
    file, tensor = tmp_path / "model.safetensors", f"model.layers.3.{name}.weight"
    stored = load_file(file)
    stored[tensor] = stored[tensor] + 1e-3
    save_file(stored, file)
    with pytest.raises(ValueError, match=rf"tensor model\.layers\.3\.{name}\.weight differs from .* not supported"):
        load_hf(tmp_path)
    del stored[tensor]  # files need not repeat it
    save_file(stored, file)
    assert same(load_hf(tmp_path), model)


def test_a_module_that_is_not_whole_is_refused(model, tmp_path):
    save_hf(model, tmp_path)
    file, settings = tmp_path / "model.safetensors", tmp_path / "config.json"
    stored = load_file(file)
    save_file({n: t for n, t in stored.items() if n != "model.layers.3.eh_proj.weight"}, file)
    with pytest.raises(ValueError, match=r"tensor model\.layers\.3\.eh_proj\.weight \[32, 64\] is missing"):
        load_hf(tmp_path)
    save_file({n: t for n, t in stored.items() if not n.startswith("model.layers.2.")}, file)
    with pytest.raises(ValueError, match=r"tensor model\.layers\.2\.\S+ \[.*\] is missing"):
        load_hf(tmp_path)
    save_file(stored, file)
    for count, words in ((1, r"model\.layers\.3\.\S+ is not part"), (10**9, "num_nextn_predict_layers=1000000000 but")):
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "num_nextn_predict_layers": count}))
        with pytest.raises(ValueError, match=words):
            load_hf(tmp_path)


def test_a_dense_model_has_no_modules():
    with pytest.raises(ValueError, match="num_nextn_predict_layers=1 in a llama"):
        lab.ModelConfig(model_type="llama", num_nextn_predict_layers=1)


# Training -----------------------------------------------------------------------------------------------------------


def test_no_token_sees_what_comes_after_it(model):
    tokens = token_ids(1, 12)
    with torch.no_grad():
        before = multi_token_logits(model, tokens)
        for place in range(12):
            other = tokens.clone()
            other[0, place] = (other[0, place] + 1) % 64
            for depth, (old, new) in enumerate(zip(before, multi_token_logits(model, other), strict=True)):
                first = max(place - depth, 0)  # position t has seen tokens up to t + depth
                assert difference(new[:, :first], old[:, :first]) < EXACT if first else True
                assert (old[:, first:] - new[:, first:]).abs().amax(dim=-1).min() > 1e-4


def test_losses_are_cross_entropies_by_the_number_of_all_tokens(model):
    batch = token_ids(3, 10)
    main, further = multi_token_loss(model, batch)
    logits = multi_token_logits(model, batch[:, :-1])
    for depth, got in enumerate([main, *further]):
        chances = logits[depth].log_softmax(-1)
        right = sum(chances[row, t, batch[row, t + 1 + depth]] for row in range(3) for t in range(9 - depth))
        torch.testing.assert_close(got, -right / (3 * 9))
    assert torch.equal(main, F.cross_entropy(logits[0].flatten(0, 1), batch[:, 1:].flatten()))
    torch.testing.assert_close(weighted_loss(main, further, 0.3), main + 0.3 / 2 * (further[0] + further[1]))
    assert weighted_loss(main, (), 0.3) is main


def test_every_module_and_the_tables_get_a_gradient_from_the_modules_losses(model):
    model.train()
    _, further = multi_token_loss(model, token_ids(4, 12))
    sum(further).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not {n for n in without if not n.endswith((".experts.gate_up_proj", ".experts.down_proj"))}
    for layer in model.expert_layers(multi_token=True)[-2:]:
        assert layer.experts.down_proj.grad[layer.load > 0].flatten(1).any(dim=1).all()


def test_gradients_of_the_tables_are_those_of_finite_differences():
    model = filled(SMALL.replace(hidden_size=12, vocab_size=20)).double()
    batch = token_ids(2, 7) % 20
    main, further = multi_token_loss(model, batch)
    weighted_loss(main, further, 0.3).backward()
    for table in (model.embed_tokens.weight, model.lm_head.weight, model.multi_token[1].eh_proj.weight):
        step = torch.randn(table.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        losses = []
        for size in (3e-4, -6e-4):
            with torch.no_grad():
                table += size * step
                main, further = multi_token_loss(model, batch)
                losses.append(weighted_loss(main, further, 0.3).item())
        with torch.no_grad():
            table += 3e-4 * step
        slope = (losses[0] - losses[1]) / 6e-4
        assert abs(slope - (table.grad * step).sum().item()) < 2e-3 * abs(slope) + 5e-4  # losses are float32


def test_a_text_too_short_for_the_last_module_is_refused(model):
    assert [part.shape[1] for part in multi_token_logits(model, token_ids(1, 3))] == [3, 2, 1]
    with pytest.raises(ValueError, match=r"got 2 tokens for 2 modules; .* give at least 3"):
        multi_token_logits(model, token_ids(1, 2))


# Without modules nothing has changed ----------------------------------------------------------------------------------


def test_a_model_without_modules_is_what_it_was_and_one_with_modules_starts_with_the_same_weights():
    torch.manual_seed(0)
    with_modules = Transformer(SMALL)
    torch.manual_seed(0)
    without = Transformer(SMALL.replace(num_nextn_predict_layers=0))
    names = without.state_dict().keys()
    assert not [name for name in names if "multi_token" in name]
    assert all(torch.equal(with_modules.state_dict()[name], tensor) for name, tensor in without.state_dict().items())
    assert sum(p.numel() for p in without.parameters()) == parameters(SMALL, "trainable").total
    tokens = token_ids(2, 9)
    logits, states = without.read(tokens)
    assert torch.equal(logits, with_modules(tokens)) and torch.equal(without.lm_head(states), logits)
    (alone,) = multi_token_logits(without, tokens)
    assert torch.equal(alone, logits)
    main, further = multi_token_loss(without, tokens)
    assert torch.equal(main, lab.training.next_token_loss(without, tokens)) and further == ()


def test_a_text_read_in_parts_leads_to_the_same_predictions(model):
    """Modules have caches of their own: slot t belongs to token t of what they read."""
    tokens = token_ids(2, 14)
    with torch.no_grad():
        expected = multi_token_logits(model, tokens)
        _, states = model.read(tokens)
        for depth, module in enumerate(model.multi_token, start=1):
            (cache,) = model.new_caches(2, 3, multi_token=True)[:1]
            parts = []
            for start, end in ((0, 6), (6, 7), (7, 9), (9, 14 - depth)):
                embedded = model.embed_tokens(tokens[:, start + depth : end + depth])
                parts.append(module(states[:, start:end], embedded, torch.arange(start, end), cache))
            states = torch.cat(parts, dim=1)
            assert difference(model.lm_head(states), expected[depth]) < EXACT


def test_narrow_arithmetic_keeps_the_projection_as_wide_as_the_head(model):
    policy = lab.precision.PrecisionPolicy(products="fp8")
    narrow = lab.model.apply_policy(model, policy)
    expected = "Linear" if "head" in policy.wide else "Fp8Linear"
    assert {type(m.eh_proj).__name__ for m in narrow.multi_token} == {type(narrow.lm_head).__name__} == {expected}
    assert type(narrow.multi_token[0].self_attn.o_proj).__name__ == "Fp8Linear"
    assert all(part.isfinite().all() for part in multi_token_logits(narrow, token_ids(1, 9)))
