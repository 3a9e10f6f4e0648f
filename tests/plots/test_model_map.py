"""The model map: its tensors are those of published files, its sums those of the ledgers, and its words have room."""

import itertools
import re

import pytest
from matplotlib import pyplot as plt

import deepseek_lab as lab
from deepseek_lab import plots
from deepseek_lab.accounting import parameters, weights
from deepseek_lab.model.layout import published_copies, published_layout
from deepseek_lab.plots.model_blocks import MODULE, WHOLE, block, block_names, pieces, rows, together
from deepseek_lab.plots.model_map import map_sheet
from deepseek_lab.plots.sheet import WIDTH, Box, Words

V3, TINY = lab.PRESETS["deepseek-v3"], lab.PRESETS["tiny"]
CONFIGS = {
    **lab.PRESETS,
    "half dense, two modules": TINY.replace(first_k_dense_replace=2, num_nextn_predict_layers=2),
    "no dense layer": TINY.replace(first_k_dense_replace=0),
    "dense, with a module": TINY.replace(n_routed_experts=None, num_experts_per_tok=0, n_shared_experts=0,
                                         num_nextn_predict_layers=1),
    "tied": lab.PRESETS["llama-3.1-8b"].replace(tie_word_embeddings=True),
}  # fmt: skip


def named(sheet, kind):
    return [shape for shape in sheet.shapes if shape.kind == kind]


def spelled_out(name):
    """Every name that "layers.[1–3].x" stands for."""
    choices = [
        [str(n) for n in range(int(part[1]), int(part[2]) + 1)]
        if (part := re.match(r"\[(\d+)–(\d+)\]", bit))
        else [bit]
        for bit in re.split(r"(\[\d+–\d+\])", name)
    ]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_names_and_shapes_are_those_of_published_files(config):
    if config.num_hidden_layers > 40:  # the names of a few layers show the pattern, and cost less
        config = config.replace(num_hidden_layers=config.first_k_dense_replace + 2)
    expected = {name: place.shape for name, place in published_layout(config).items()}
    expected |= dict.fromkeys(published_copies(config), (config.vocab_size, config.hidden_size))
    found = {}
    for piece in pieces(config):
        layer = "" if piece.layers is None else f"model.layers.[{piece.layers[0]}–{piece.layers[1]}]."
        names = spelled_out(layer + piece.row.name)
        assert len(names) == piece.row.tensors
        found |= dict.fromkeys(names, piece.row.shape)
    assert found == expected


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_blocks_add_up_to_the_ledgers(config):
    has_module = config.num_nextn_predict_layers > 0
    own = together("model", [p.row for p in pieces(config) if p.place != MODULE])
    assert own.elements == parameters(config).total
    assert own.flops == 2 * parameters(config, "active_without_embedding").total
    everything = together("files", [p.row for p in pieces(config)])
    assert everything.stored == weights(config, "fp8", has_module).total
    assert everything.plain == weights(config, "bf16", has_module).total
    places = dict.fromkeys(p.place for p in pieces(config))
    assert together("all", [row for place in places for row in rows_of(config, place)]) == together(
        "all", rows(config, WHOLE)
    )
    for name in block_names(config):
        assert together("x", rows(config, name)) == together("x", [p.row for p in block(config, name)])


def rows_of(config, place):
    return [p.row for p in pieces(config) if p.place == place]


def test_v3_by_hand():
    attention = rows(V3, "attention")
    assert [row.name.rpartition("self_attn.")[2] for row in attention] == [
        "q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight",
        "kv_a_layernorm.weight", "kv_b_proj.weight", "o_proj.weight",
    ]  # fmt: skip
    assert together("", attention).elements == 61 * 187_107_328
    (gate, up, down), width = rows(V3, "routed experts"), 2048 * 7168
    assert gate.name == "model.layers.[3–60].mlp.experts.[0–255].gate_proj.weight"
    assert (gate.shape, down.shape, gate.tensors) == ((2048, 7168), (7168, 2048), 58 * 256)
    assert gate.elements == up.elements == down.elements == 58 * 256 * width
    assert gate.flops == 2 * 58 * 8 * width and gate.plain == 2 * gate.elements
    assert gate.stored == gate.elements + 58 * 256 * 16 * 56 * 4
    assert together("", rows(V3, "dense layers")).elements == 3 * 583_483_392
    assert together("", rows(V3, "expert layers")).elements == 58 * 11_507_286_272
    module = together("", rows(V3, MODULE))
    assert module.elements == 11_610_068_224 + 2 * 926_679_040
    assert together("", rows(V3, WHOLE)).stored == 688_574_839_360


@pytest.mark.parametrize("name", block_names(V3))
def test_the_bars_show_the_shares_of_the_model_and_the_block_in_full_colour(name):
    sheet, model = map_sheet(V3, name), together("", [p.row for p in pieces(V3) if p.place != MODULE])
    for field in ("elements", "flops"):
        (frame,) = [box for box in named(sheet, "model") if box.name == field]
        bars = [box for box in named(sheet, "share") if box.name.startswith(field)]
        for left, right in itertools.pairwise(bars):
            assert left.x + left.width == pytest.approx(right.x)
        pixel = frame.width / getattr(model, field)
        everything = sum(getattr(p.row, field) for p in pieces(V3))
        assert sum(box.width for box in bars) == pytest.approx(pixel * everything)
        of_whole = map_sheet(V3, WHOLE)
        full = {b.fill for b in named(of_whole, "share")}
        lit = sum(box.width for box in bars if box.fill in full)
        assert lit == pytest.approx(pixel * sum(getattr(p.row, field) for p in block(V3, name)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_block_can_be_clicked_and_the_chosen_one_has_a_thick_edge(config):
    for name in block_names(config):
        sheet = map_sheet(config, name)
        assert {box.name for box in named(sheet, "block")} == set(block_names(config)) - {WHOLE}
        thick = [(s.x, s.y, s.width) for s in sheet.shapes if isinstance(s, Box) and s.line == 3]
        assert thick == [(s.x, s.y, s.width) for s in named(sheet, "block") if s.name == name]


def test_as_many_experts_are_filled_as_work_on_a_token():
    for config in (V3, TINY, lab.PRESETS["deepseek-v2"], TINY.replace(n_routed_experts=16, num_experts_per_tok=8)):
        cells = named(map_sheet(config, "gate"), "expert")
        assert len({(cell.x, cell.y) for cell in cells}) == len(cells) == config.n_routed_experts
        assert sum(cell.fill != "#FFFFFF" for cell in cells) == config.num_experts_per_tok


def test_the_label_and_the_table_say_what_the_picture_shows():
    sheet = map_sheet(V3, "gate")
    assert sheet.label == (
        "gate: 106.4 M of 671.0 B parameters, 0.02 %. 106,445,312 numbers in 116 tensors; a token uses 106,445,312: "
        "212.9 MFLOP; 203.1 MiB in the FP8 layout of V3's files, 203.1 MiB in BF16"
    )
    assert [w.text for w in named(sheet, "prefix")] == ["model.layers.[3–60].mlp.gate.…"]
    assert [w.text for w in named(sheet, "tensor")] == ["weight", "e_score_correction_bias", "together"]
    assert [w.text for w in named(sheet, "cell")][:5] == ["256 × 7,168", "58", "203.0 MiB", "203.0 MiB", "212.9 MFLOP"]
    assert [w.text for w in named(sheet, "percent")] == ["0.02 %", "0.3 %"]
    assert sheet.detail.startswith("model.layers.[3–60].mlp.gate.weight: 58 tensors of 256 × 7,168, 203.0 MiB, ")
    assert "a token reads one row and multiplies nothing" in map_sheet(TINY, "embedding").label
    assert map_sheet(V3, MODULE).label.startswith(
        "prediction module: 13.5 B numbers in the files, 2.0 % on top of the model. 13,463,426,304 numbers in 788"
    )
    assert map_sheet(V3).label.startswith("whole model: 671,026,419,200 parameters. ")


def test_sheets_are_of_one_size_and_their_words_are_inside_and_do_not_touch():
    chosen = [(V3, name) for name in (WHOLE, MODULE, "attention", "norms", "routed experts")]
    chosen += [(lab.PRESETS["qwen2.5-72b"], "attention"), (lab.PRESETS["deepseek-v2"], "shared experts"),
               (CONFIGS["tied"], "embedding and output head"), (lab.PRESETS["deepseek-v2"], "gate")]  # fmt: skip
    assert len({map_sheet(*each).height for each in chosen}) == 1
    for config, name in chosen:
        ax = plots.model_map(config, name)
        ax.figure.canvas.draw()
        frame, boxes = ax.figure.bbox, [(text.get_text(), text.get_window_extent()) for text in ax.texts]
        for text, box in boxes:
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, (name, text)
        for (one, a), (other, b) in itertools.combinations(boxes, 2):
            wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert wide <= 0 or high <= 4, (name, one, other)
        plt.close("all")


def test_the_twin_has_the_boxes_and_words_of_the_sheet():
    _, ax = plt.subplots()
    assert plots.model_map(TINY, "attention", ax=ax) is ax
    sheet = map_sheet(TINY, "attention")
    boxes = [(b.x, b.y, b.width, b.height) for b in named(sheet, "share")]
    patches = [p for p in ax.patches if p.get_label().startswith("share")]
    assert [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in patches] == boxes
    assert [t.get_text() for t in ax.texts] == [s.text for s in sheet.shapes if isinstance(s, Words)]
    assert ax.get_xlim() == (0, WIDTH)


def test_a_block_that_the_model_does_not_have_is_refused():
    with pytest.raises(
        ValueError, match="block='gate' is not in this model; choose one of whole model, embedding, lay"
    ):
        plots.model_map(lab.PRESETS["llama-3.1-8b"], "gate")
    with pytest.raises(TypeError, match="got str instead of a ModelConfig"):
        plots.model_map("tiny")
