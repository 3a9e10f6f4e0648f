"""Paged equals contiguous, whatever is appended, forked, cut and freed; no block is lost and none has two writers."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deepseek_lab.attention import BlockPool, Fp8LatentCache, LatentCache, OutOfBlocks, PagedCache
from deepseek_lab.model import Transformer
from deepseek_lab.presets import PRESETS

TINY = PRESETS["tiny"]
SMALL = TINY.replace(kv_lora_rank=3, qk_rope_head_dim=2)
SIZE, BLOCKS = 4, 10


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def snapshot(pool):
    """Everything a pool knows; the slots of free blocks and behind the last token do not count."""
    filled = {b.index: pool.storage[b.index, : b.filled].clone() for b in pool.blocks() if b.filled}
    return copy.deepcopy(pool.sequences), list(pool.references), sorted(pool._free), filled


def unchanged(pool, before):
    now = snapshot(pool)
    return now[:3] == before[:3] and all(torch.equal(now[3][b], before[3][b]) for b in before[3])


class Paged(RuleBasedStateMachine):
    """A pool of ten blocks beside plain lists of tensors, one per sequence of every cache."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(SMALL, BLOCKS, SIZE)
        self.caches: list[tuple[PagedCache, list[torch.Tensor]]] = []
        self.seed = 0

    def pick(self, data):
        return data.draw(st.sampled_from(range(len(self.caches))), "cache")

    @precondition(lambda self: len(self.caches) < 4)
    @rule(batch=st.integers(1, 3))
    def begin(self, batch):
        self.caches.append((PagedCache(self.pool, batch), [torch.empty(0, 5)] * batch))

    @precondition(lambda self: self.caches)
    @rule(data=st.data(), longest=st.integers(0, 9), ragged=st.booleans())
    def append(self, data, longest, ragged):
        cache, plain = self.caches[self.pick(data)]
        tokens = [data.draw(st.integers(0, longest)) for _ in plain] if ragged else [longest] * len(plain)
        self.seed += 1
        new, before = random(len(plain), longest, 5, seed=self.seed), snapshot(self.pool)
        try:
            cache.append(new, tokens=tokens if ragged else None)
        except OutOfBlocks:
            assert unchanged(self.pool, before)
            return
        plain[:] = [torch.cat([old, row[longest - n :]]) for old, row, n in zip(plain, new, tokens, strict=True)]

    @precondition(lambda self: self.caches and len(self.caches) < 4)
    @rule(data=st.data())
    def fork(self, data):
        cache, plain = self.caches[self.pick(data)]
        chosen = data.draw(st.lists(st.integers(0, len(plain) - 1), max_size=3))
        before = snapshot(self.pool)
        self.caches.append((cache.fork(*chosen), [plain[i] for i in chosen or range(len(plain))]))
        assert sorted(self.pool._free) == before[2]  # a fork takes no block

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def truncate(self, data):
        cache, plain = self.caches[self.pick(data)]
        length = data.draw(st.integers(0, cache.length))
        lost = cache.length - length
        cache.truncate(length)
        plain[:] = [old[: max(len(old) - lost, 0)] for old in plain]

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def truncate_one(self, data):
        cache, plain = self.caches[self.pick(data)]
        i = data.draw(st.integers(0, len(plain) - 1))
        length = data.draw(st.integers(0, len(plain[i])))
        cache.truncate(length, sequence=i)
        plain[i] = plain[i][:length]

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def free(self, data):
        i = self.pick(data)
        cache, plain = self.caches[i]
        chosen = data.draw(st.sets(st.integers(0, len(plain) - 1)))
        cache.free(*chosen)
        plain[:] = [old for j, old in enumerate(plain) if chosen and j not in chosen]
        if not plain:
            del self.caches[i]

    @invariant()
    def contents_are_those_of_the_plain_lists(self):
        for cache, plain in self.caches:
            (seen,), hidden = cache.view(), cache.hidden()
            assert cache.lengths == [len(tokens) for tokens in plain] and seen.shape[1] == cache.length
            for row, gone, tokens in zip(seen, hidden, plain, strict=True):
                padding = cache.length - len(tokens)
                assert torch.equal(row[padding:], tokens) and not row[:padding].any()
                assert gone.tolist() == [True] * padding + [False] * len(tokens)

    @invariant()
    def references_count_the_tables_and_no_block_is_lost(self):
        pool, named = self.pool, Counter()
        for sequence in pool.sequences.values():
            assert len(sequence.table) == -(-sequence.length // SIZE)
            named.update(sequence.table)
        assert pool.references == [named[block] for block in range(BLOCKS)]
        assert sorted([*pool._free, *named]) == list(range(BLOCKS))

    @invariant()
    def what_is_shown_agrees_with_what_is_stored(self):
        blocks, usage = self.pool.blocks(), self.pool.usage()
        assert all(len(block.owners) == block.references and 0 <= block.filled <= SIZE for block in blocks)
        assert all((block.filled > 0) == (block.references > 0) for block in blocks)
        assert usage.free_blocks + usage.used_blocks == BLOCKS
        assert usage.allocated_slots == SIZE * usage.used_blocks >= usage.filled_slots
        assert usage.stored_tokens == sum(len(tokens) for _, plain in self.caches for tokens in plain)
        assert 0 <= usage.fragmentation < 1

    def teardown(self):
        for cache, _ in self.caches:
            cache.free()
        assert not any(self.pool.references) and not self.pool.sequences
        assert sorted(self.pool._free) == list(range(BLOCKS))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_store_that_is_interrupted_leaves_every_sequence_as_it_was(monkeypatch, error, written):
    pool = BlockPool(SMALL, BLOCKS, SIZE)
    cache = PagedCache(pool, 3)
    cache.append(random(3, 6, 5), tokens=[6, 3, 4])
    before, left, write = snapshot(pool), [written], pool.write

    def interrupted(slots, joint):
        if not left[0]:
            raise error
        left[0] -= 1
        write(slots, joint)

    with monkeypatch.context() as patch:
        patch.setattr(pool, "write", interrupted)
        with pytest.raises(error):
            cache.append(random(3, 5, 5, seed=1))
    assert unchanged(pool, before) and cache.lengths == [6, 3, 4]


def test_blocks_that_could_not_be_copied_are_lost_neither_by_a_fork_nor_by_growing(monkeypatch):
    pool = BlockPool(SMALL, 2, SIZE, grows=True)
    cache = PagedCache(pool)
    cache.append(random(1, 3, 5))
    twin, before = cache.fork(), snapshot(pool)

    class Interrupting(torch.Tensor):
        def __setitem__(self, *what):
            raise KeyboardInterrupt

    whole = pool.storage
    pool.storage = whole.as_subclass(Interrupting)
    with pytest.raises(KeyboardInterrupt):
        twin.append(random(1, 1, 5))  # copies the block that both name
    pool.storage = whole
    assert unchanged(pool, before)
    with monkeypatch.context() as patch:
        patch.setattr("deepseek_lab.attention.pool.new_buffer",
                      lambda *shape: torch.zeros(1).as_subclass(Interrupting))  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            twin.append(random(1, 30, 5))
    assert unchanged(pool, before)


TestPaged = Paged.TestCase
TestPaged.settings = settings(max_examples=60, stateful_step_count=25)


@pytest.mark.parametrize(("layout", "kind"), [("latent", LatentCache), ("latent_fp8", Fp8LatentCache)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_and_contiguous_caches_read_the_same_bits(layout, kind, dtype):
    pool = BlockPool(TINY, 20, 8, dtype, layout=layout)
    paged, contiguous = PagedCache(pool, 3), kind(TINY, 3, dtype=dtype)
    for seed, tokens in enumerate((5, 1, 1, 30, 8)):
        new = random(3, tokens, TINY.latent_width, seed=seed).to(dtype)
        seen = paged.append(new)
        assert torch.equal(seen, contiguous.append(new)) and seen.dtype == dtype
    assert paged.nbytes == contiguous.nbytes and paged.allocated_nbytes == paged.nbytes // 45 * 48
    for cache in (paged, contiguous):
        cache.truncate(17)
    assert torch.equal(paged.view()[0], contiguous.view()[0])


def test_a_block_of_v3_in_eight_bits_is_64_times_656_bytes():
    pool = BlockPool(PRESETS["deepseek-v3"], 3, layout="latent_fp8")
    assert pool.bytes_per_token == 656 and pool.storage.nbytes == 3 * 64 * 656
    cache = PagedCache(pool)
    cache.append(random(1, 65, 576))
    assert cache.nbytes == 65 * 656 and cache.allocated_nbytes == 128 * 656


def test_eight_answers_to_one_question_store_it_once():
    pool = BlockPool(SMALL, 30, SIZE)
    question = PagedCache(pool)
    question.append(random(1, 10, 5))
    answers = question.fork(*[0] * 8)
    assert pool.usage().used_blocks == 3 and pool.usage().shared_blocks == 3
    assert pool.references[:3] == [9, 9, 9]
    answers.append(random(8, 1, 5, seed=1))
    usage = pool.usage()  # the two full blocks are still shared; the third, half full, was copied by all eight
    assert (usage.used_blocks, usage.shared_blocks, usage.stored_tokens) == (11, 2, 10 + 8 * 11)
    assert answers.nbytes == 88 * pool.bytes_per_token
    assert answers.allocated_nbytes == (2 + 8) * SIZE * pool.bytes_per_token
    question.free()
    assert pool.usage().used_blocks == 10


def test_the_last_who_names_a_block_writes_into_it_without_a_copy():
    pool = BlockPool(SMALL, 2, SIZE)
    cache = PagedCache(pool)
    cache.append(random(1, 2, 5))
    pair = cache.fork(0, 0)
    cache.free()
    pair.append(random(2, 1, 5, seed=1))  # two writers, two blocks in all: one copy is enough
    assert pool.usage().free_blocks == 0 and pool.references == [1, 1]


@pytest.mark.parametrize(("lengths", "filled"), [([4, 4], 8), ([1, 1], 2), ([5, 8], 13), ([3, 9], 12)])
def test_fragmentation_is_the_share_of_slots_in_use_that_hold_no_token(lengths, filled):
    pool = BlockPool(SMALL, BLOCKS, SIZE)
    PagedCache(pool, 2).append(random(2, 9, 5), tokens=lengths)
    blocks = sum(-(-n // SIZE) for n in lengths)
    assert pool.usage().filled_slots == filled
    assert pool.usage().fragmentation == 1 - filled / (SIZE * blocks)
    assert BlockPool(SMALL, 1).usage().fragmentation == 0


def test_left_padding_is_not_stored():
    pool = BlockPool(SMALL, BLOCKS, SIZE)
    cache, new = PagedCache(pool, 2), random(2, 6, 5)
    seen = cache.append(new, tokens=[6, 2])
    assert cache.lengths == [6, 2] and cache.nbytes == 8 * pool.bytes_per_token
    assert torch.equal(seen[0], new[0]) and torch.equal(seen[1, 4:], new[1, 4:]) and not seen[1, :4].any()
    assert cache.hidden().tolist() == [[False] * 6, [True] * 4 + [False] * 2]


def test_a_full_pool_stores_nothing_and_goes_on_when_there_is_room_again():
    pool = BlockPool(SMALL, 3, SIZE)
    first, second = PagedCache(pool), PagedCache(pool)
    first.append(random(1, 6, 5))
    second.append(random(1, 4, 5, seed=1))
    before = snapshot(pool)
    with pytest.raises(OutOfBlocks, match="2 new blocks of 4 tokens are needed, 0 of 3 are free"):
        second.append(random(1, 5, 5))
    assert unchanged(pool, before)
    first.free()
    assert second.append(random(1, 5, 5)).shape == (1, 9, 5)


def test_a_pool_that_grows_keeps_what_it_holds():
    pool = BlockPool(SMALL, 1, SIZE, grows=True)
    cache, new = PagedCache(pool), random(1, 50, 5)
    cache.append(new[:, :3])
    assert torch.equal(cache.append(new[:, 3:]), new)
    assert len(pool.references) == len(pool.storage) == 13 and pool.usage().free_blocks == 0


@pytest.mark.parametrize("tokens", [[1], [1, 2, 3], [1, 4], [1, -1], [1, 1.0]])
def test_counts_that_do_not_fit_the_new_tokens_are_refused(tokens):
    pool = BlockPool(SMALL, BLOCKS, SIZE)
    cache = PagedCache(pool, 2)
    before = snapshot(pool)
    with pytest.raises(ValueError, match=r"PagedCache.append got tokens=\[.* for 2 sequences of 3 new tokens"):
        cache.append(random(2, 3, 5), tokens=tokens)
    assert unchanged(pool, before)


def test_a_freed_cache_refuses_everything_and_a_freed_sequence_has_left_the_batch():
    pool = BlockPool(SMALL, BLOCKS, SIZE)
    cache, other = PagedCache(pool, 2), PagedCache(pool)
    other.append(random(1, 3, 5))
    cache.append(random(2, 3, 5, seed=1))
    cache.free(0)
    assert torch.equal(cache.view()[0], random(2, 3, 5, seed=1)[1:])
    for use in (lambda: cache.fork(1), lambda: cache.truncate(0, sequence=1), lambda: cache.free(0, 1)):
        with pytest.raises(ValueError, match="holds 1 sequences, there is no sequence 1; was it freed"):
            use()
    with pytest.raises(ValueError, match=r"append got \(2, 1, 5\), expected \(1, 1, 5\)"):
        cache.append(random(2, 1, 5))
    cache.free()
    before = snapshot(pool)
    for use in (lambda: cache.append(random(0, 1, 5)), cache.fork, cache.view, cache.free, lambda: cache.truncate(0)):
        with pytest.raises(ValueError, match="this PagedCache was freed"):
            use()
    assert unchanged(pool, before) and cache.length == cache.nbytes == cache.allocated_nbytes == 0
    assert torch.equal(other.view()[0], random(1, 3, 5))


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [(TINY, "grouped", "layout='grouped' for a model with latent attention"),
     (PRESETS["llama-3.1-8b"], "latent", "layout='latent' for a model with grouped heads")],
)  # fmt: skip
def test_a_pool_for_what_it_cannot_hold_is_refused(config, layout, message):
    with pytest.raises(ValueError, match=message):
        BlockPool(config, 2, layout=layout)


@pytest.mark.parametrize("sizes", [(0, 64), (2, 0), (-1, 64)])
def test_a_pool_without_room_is_refused(sizes):
    with pytest.raises(ValueError, match="both must be at least 1"):
        BlockPool(TINY, *sizes)


def test_a_model_writes_three_answers_into_one_pool_per_layer_as_if_each_were_alone():
    torch.manual_seed(0)
    model = Transformer(TINY).eval()
    question, answers = torch.randint(260, (1, 10)), torch.randint(260, (3, 7))
    with torch.no_grad():
        caches = [PagedCache(BlockPool(TINY, 20, SIZE)) for _ in model.layers]
        model(question, caches)
        caches = [cache.fork(0, 0, 0) for cache in caches]
        parts = [model(answers[:, :4], caches), *(model(answers[:, t : t + 1], caches) for t in range(4, 7))]
        whole = model(torch.cat([question.expand(3, -1), answers], dim=1))[:, 10:]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)
    assert caches[0].pool.usage().shared_blocks == 2  # the full blocks of the question
