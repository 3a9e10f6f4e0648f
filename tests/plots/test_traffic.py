"""The traffic map: a line for every copy, as dark and thick as it says, nodes as full as the record, bytes to scale."""

import itertools

import pytest
import torch
from matplotlib import pyplot as plt

import deepseek_lab as lab
from deepseek_lab import plots
from deepseek_lab.experts import LayerTraffic, trace_routing, trace_traffic, traffic
from deepseek_lab.plots.sheet import WIDTH, Box, Line, Words
from deepseek_lab.plots.style import INK
from deepseek_lab.plots.traffic import ROWS, traffic_sheet

TINY, V3 = lab.PRESETS["tiny"], lab.PRESETS["deepseek-v3"]
TEXT = "def $x_1$(value):\n\treturn <b>, one by one"


def traced():
    torch.manual_seed(0)
    model = lab.model.Transformer(TINY)
    return trace_traffic(trace_routing(model, lab.data.ByteTokenizer().encode(TEXT)[None]), TINY)


def large(tokens):
    """As wide as it gets: eight nodes, long pieces."""
    draws = torch.rand(tokens, 256, generator=torch.Generator().manual_seed(0))
    ways = traffic(draws.view(tokens, 8, 32)[:, 2:6].flatten(1).topk(8).indices + 64, V3)
    return [LayerTraffic(60, 4, ways, traffic(draws.topk(8).indices, V3))], ["counterrevolution"] * tokens


LAYERS = traced()


def named(sheet, kind):
    return {shape.name: shape for shape in sheet.shapes if shape.kind == kind and not isinstance(shape, Words)}


def sides(at):
    return {"without": at.free, "with": at.limited}


@pytest.mark.parametrize(("layer", "token"), [(1, 0), (2, 20), (3, len(TEXT) - 1)])
def test_every_copy_of_a_shown_token_is_a_line_as_thick_as_its_experts(layer, token):
    at, sheet = LAYERS[layer - 1], traffic_sheet(LAYERS, TEXT, layer, token)
    first = max(min(token - ROWS // 2, len(TEXT) - ROWS), 0)
    for name, side in sides(at).items():
        lines = named(sheet, name)
        expected = {
            f"{i} to {node}": side.slots[i, node].item()
            for i, node in itertools.product(range(first, first + ROWS), range(4))
            if side.slots[i, node]
        }
        assert lines.keys() == expected.keys()
        for place, line in lines.items():
            assert isinstance(line, Line) and (line.edge == INK) == place.startswith(f"{token} to ")
        for dark in (True, False):
            widths = {(expected[p], line.line) for p, line in lines.items() if (line.edge == INK) == dark}
            assert [n for n, _ in sorted(widths)] == sorted({n for n, _ in widths})
            assert sorted(widths, key=lambda pair: pair[1]) == sorted(widths)
        order = [line.edge == INK for line in sheet.shapes if isinstance(line, Line) and line.kind == name]
        assert order == sorted(order), "the chosen token's lines lie on top"


def test_lines_begin_at_their_token_and_end_at_their_node():
    sheet = traffic_sheet(LAYERS, TEXT, 2, 20)
    nodes, rows = named(sheet, "node"), [shape.y for shape in sheet.shapes if shape.kind == "piece"]
    for name in ("without", "with"):
        for place, line in named(sheet, name).items():
            token, node = map(int, place.split(" to "))
            (_, start), (x, end) = line.points
            box = nodes[f"{name} {node}"]
            assert x == (box.x + box.width if name == "without" else box.x)
            assert box.y < end < box.y + box.height
            assert start == pytest.approx(rows[token - 20 + ROWS // 2] - 4)


def test_nodes_are_as_full_as_they_have_tokens_and_framed_where_the_token_goes():
    for token in (0, 13, len(TEXT) - 1):
        for at in LAYERS:
            sheet = traffic_sheet(LAYERS, TEXT, at.layer, token)
            nodes, received = named(sheet, "node"), named(sheet, "received")
            for name, side in sides(at).items():
                for node in range(4):
                    box, fill = nodes[f"{name} {node}"], received[f"{name} {node}"]
                    assert fill.width / box.width == pytest.approx(side.tokens[node].item() / len(TEXT))
                    assert (box.edge == INK) == side.sent[token, node].item()
            experts = [w.text for w in sheet.shapes if w.kind == "experts"]
            counts = [n for side in sides(at).values() for n in side.slots[token].tolist() if n]
            assert experts == ["1 expert" if n == 1 else f"{n} experts" for n in counts]


def test_bytes_are_those_of_the_record_on_one_scale():
    at, token = LAYERS[1], 8
    sheet = traffic_sheet(LAYERS, TEXT, 2, token)
    out, back = named(sheet, "out bytes"), named(sheet, "back bytes")
    for title, chosen in (("this token", slice(token, token + 1)), (f"all {len(TEXT)}", slice(None))):
        pixels = set()
        for name, side in sides(at).items():
            there, again = out[f"{title} {name}"], back[f"{title} {name}"]
            assert again.x == there.x + there.width
            pixels |= {round(there.width / side.dispatched[chosen].sum().item(), 9)}
            pixels |= {round(again.width / side.combined[chosen].sum().item(), 9)}
        assert len(pixels) == 1
    words = [w.text for w in sheet.shapes if w.kind == "bytes"]
    assert words[-1].endswith(f"\N{MINUS SIGN}{100 * at.saved:.1f} %")
    assert words[2].startswith(f"{at.free.nodes_touched.double().mean():.2f} nodes each, ")
    assert words[0].startswith(f"{at.free.nodes_touched[token]} nodes, ")


def test_label_and_detail_say_what_is_shown():
    at, sheet = LAYERS[0], traffic_sheet(LAYERS, TEXT, 1, 4)
    nodes = at.free.nodes_touched[4].item(), at.limited.nodes_touched[4].item()
    assert sheet.label.startswith(
        f'token 4 "$", layer 1: {nodes[0]} nodes without limit, {nodes[1]} with. Bytes out and'
    )
    assert f"with the limit, tokens at each node: {', '.join(map(str, at.limited.tokens.tolist()))}" in sheet.detail


def test_without_a_limit_nothing_is_saved_and_nothing_claims_so():
    same = [LayerTraffic(1, 4, LAYERS[0].free, LAYERS[0].free)]
    words = [w.text for w in traffic_sheet(same, TEXT, 1, 3).shapes if isinstance(w, Words)]
    assert "at most 4 nodes" in words and not [text for text in words if "%" in text]


@pytest.mark.parametrize("tokens", [1, 3, 17, 1_200])
def test_words_do_not_touch_and_nothing_is_clipped_at_any_length(tokens):
    plots.use_style()
    layers, pieces = large(tokens)
    ax = plots.traffic_map(layers, pieces)
    ax.figure.canvas.draw()
    frame, boxes = ax.figure.bbox, [text.get_window_extent() for text in ax.texts]
    for box in boxes:
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    across = [
        (a.get_text(), b.get_text())
        for (a, one), (b, two) in itertools.combinations(zip(ax.texts, boxes, strict=True), 2)
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 0 and min(one.y1, two.y1) - max(one.y0, two.y0) > 3
    ]
    assert across == []


def test_pictures_of_one_trace_have_one_size():
    sheets = [traffic_sheet(LAYERS, TEXT, layer, token) for layer in (1, 3) for token in (0, 19)]
    assert len({sheet.height for sheet in sheets}) == 1
    for sheet in sheets:
        assert all(s.x >= 0 and s.x + s.width <= WIDTH for s in sheet.shapes if isinstance(s, Box))


def test_the_static_twin_has_the_boxes_and_words_of_the_widget():
    ax, sheet = plots.traffic_map(LAYERS, TEXT), traffic_sheet(LAYERS, TEXT, 3, len(TEXT) // 2)
    assert [t.get_text() for t in ax.texts] == [s.text for s in sheet.shapes if isinstance(s, Words)]
    boxes = {f"{b.kind} {b.name}": (b.x, b.y, b.width, b.height) for b in sheet.shapes if isinstance(b, Box) and b.name}
    drawn = {p.get_label(): (p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in ax.patches}
    assert boxes.items() <= drawn.items() and len(boxes) == 4 * 2 * 2 + 8
    _, other = plt.subplots()
    assert plots.traffic_map(LAYERS, TEXT, 1, 0, ax=other) is other


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="got no layers"):
        plots.traffic_map([], TEXT)
    with pytest.raises(ValueError, match="layer 0 has no traffic here; choose one of 1, 2, 3"):
        plots.traffic_map(LAYERS, TEXT, layer=0)
    with pytest.raises(ValueError, match=f"got 2 pieces for {len(TEXT)} tokens"):
        plots.traffic_map(LAYERS, "ab")
    with pytest.raises(ValueError, match="token=-1 is not in this text"):
        plots.traffic_map(LAYERS, TEXT, token=-1)
    wide = traffic(torch.tensor([[0, 1, 2, 3]]), TINY, nodes=16)
    with pytest.raises(ValueError, match="got 16 nodes; it draws up to 8"):
        plots.traffic_map([LayerTraffic(1, 4, wide, wide)], "a")
    none = traffic(torch.zeros(0, 4, dtype=torch.int64), TINY)
    with pytest.raises(ValueError, match="0 pieces for 0 tokens"):
        plots.traffic_map([LayerTraffic(1, 2, none, none)], "")
