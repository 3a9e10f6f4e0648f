"""The picture of a paged cache shows its blocks, who shares them, and bytes that the pool itself counts."""

import pytest
import torch

from deepseek_lab import plots
from deepseek_lab.attention import BlockPool, PagedCache, pool_step
from deepseek_lab.plots.paged import LEFT, WIDE, check_trace, paged_sheet
from deepseek_lab.plots.sheet import WIDTH
from deepseek_lab.presets import PRESETS

CONFIG = PRESETS["tiny"]


def trace(blocks=20, size=16, forks=2):
    """Append, fork, write into the forks, free: a step after each."""
    pool, generator = BlockPool(CONFIG, blocks, size), torch.Generator().manual_seed(6)

    def text(tokens, batch=1):
        return torch.randn(batch, tokens, CONFIG.latent_width, generator=generator)

    steps, cache = [pool_step(pool, "nothing")], PagedCache(pool)
    cache.append(text(6 * size + 4))
    steps.append(pool_step(pool, "append"))
    fork = cache.fork(*[0] * forks)
    steps.append(pool_step(pool, "fork"))
    fork.append(text(3, forks))
    steps.append(pool_step(pool, "write"))
    cache.free()
    steps.append(pool_step(pool, "free"))
    return steps


def boxes(sheet, kind):
    return {box.name: box for box in sheet.shapes if getattr(box, "kind", "") == kind}


def test_every_block_is_a_cell_of_its_kind_filled_as_far_as_its_slots():
    steps = trace()
    for number, step in enumerate(steps):
        sheet = paged_sheet(steps, number)
        kinds = {kind: boxes(sheet, kind) for kind in ("shared", "own", "free")}
        filled, empty = boxes(sheet, "filled"), boxes(sheet, "empty")
        for block in step.blocks:
            kind = "shared" if block.references > 1 else "own" if block.references else "free"
            assert [name for name, cells in kinds.items() if str(block.index) in cells] == [kind]
            if block.references:
                share = filled[str(block.index)].width / (
                    filled[str(block.index)].width + empty[str(block.index)].width
                )
                assert share == pytest.approx(block.filled / 16) and empty[str(block.index)].hatch
        assert len(filled) == step.usage.used_blocks and len(kinds["shared"]) == step.usage.shared_blocks
        assert all(cell.line > 2 for cell in kinds["shared"].values())
    assert [step.usage.shared_blocks for step in steps] == [0, 0, 7, 6, 6]


def test_the_bytes_are_those_of_the_pool():
    steps, token = trace(), 4 * CONFIG.latent_width
    assert [step.allocated // token for step in steps] == [0, 112, 112, 144, 128]
    assert [step.stored // token for step in steps] == [0, 100, 300, 306, 206]
    assert [step.filled // token for step in steps] == [0, 100, 100, 96 + 4 + 7 + 7, 96 + 7 + 7]
    for number, step in enumerate(steps):
        assert (step.empty, step.saved) == (step.allocated - step.filled, step.stored - step.filled)
        bars = {b.kind: b for b in paged_sheet(steps, number).shapes if getattr(b, "kind", "").endswith(" bytes")}
        unit = WIDE / (20 * 16 * token)
        assert bars["filled bytes"].width == pytest.approx(step.filled * unit)
        assert bars["empty bytes"].x == pytest.approx(LEFT + step.filled * unit)
        assert bars["empty bytes"].width == pytest.approx(step.empty * unit)
        assert bars["stored bytes"].width == pytest.approx(step.stored * unit)


def test_label_and_detail_say_what_is_shown():
    sheet = paged_sheet(trace(), 3)
    assert sheet.label.startswith("4 of 5: write. 9 of 20 blocks used, 6 shared; taken in one layer")
    assert "block 0: 16 of 16 slots, sequences 0, 1, 2" in sheet.detail
    owners = [word.text for word in sheet.shapes if getattr(word, "kind", "") == "owners"]
    assert owners == ["0,1,2"] * 6 + ["0", "1", "2"]


def test_many_owners_are_counted_and_the_picture_keeps_its_size():
    steps = trace(blocks=64, size=8, forks=40)
    sheets = [paged_sheet(steps, number) for number in range(len(steps))]
    assert len({sheet.height for sheet in sheets}) == 1
    assert [w.text for w in sheets[2].shapes if getattr(w, "kind", "") == "owners"] == ["41 seq."] * 7
    for sheet in sheets:
        assert all(box.x + box.width <= WIDTH - 13 for box in sheet.shapes if hasattr(box, "width"))


def test_a_trace_is_of_one_pool_that_fits():
    with pytest.raises(ValueError, match="got 0 steps"):
        check_trace([])
    with pytest.raises(ValueError, match=r"2 steps with blocks of \[4, 8\] tokens"):
        check_trace([trace(size=4)[0], trace(size=8)[0]])
    with pytest.raises(ValueError, match="pool of 65 blocks"):
        check_trace(trace(65))
    with pytest.raises(IndexError):
        plots.paged_cache(trace(), 5)


def test_a_pool_that_grows_keeps_the_height_of_its_largest():
    steps = [*trace(20), *trace(44)]
    heights = {paged_sheet(steps, number).height for number in range(len(steps))}
    assert heights == {paged_sheet(trace(44), 0).height}
    assert len(boxes(paged_sheet(steps, 0), "free")) == 20


def test_the_static_twin_draws_the_last_step_unless_told():
    assert "5 of 5: free" in [text.get_text() for text in plots.paged_cache(trace()).texts]
    assert "2 of 5: append" in [text.get_text() for text in plots.paged_cache(trace(), 1).texts]
