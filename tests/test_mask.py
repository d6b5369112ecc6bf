"""Which key each query may see: first keys, spans and block masks against brute force, and FlexAttention on top."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from tools import dense_mask, random_starts
from torch.nn.attention.flex_attention import create_mask, flex_attention

import train_gpt2
from train_gpt2 import (
    GPT, MASK_BLOCK, SMALL_BLOCK, SMALL_TILES, Config, attention, attention_masks, block_mask, block_size,
    document_starts, first_visible_key, interval_rule, span_mask)

WINDOWS = (0, 1, 2, 30, 63, 99, 126, 127, 128, 254, 255, 256, 383, 511, 999, 100_000, 2**40)


def layouts(count: int, tokens: tuple[int, ...], seed: int):
    """Yield (starts, window): one to three random rows of one of these lengths; then, where 512 is one of
    them, documents that end on borders of blocks and beside them, with windows that fill up blocks."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        rows, length, window = int(draw.integers(1, 4)), int(draw.choice(tokens)), int(draw.choice(WINDOWS))
        yield random_starts(rows, length, draw), window
    for places in ([], [128], [127, 129], [128, 256, 384], [1, 255, 257, 511]) if 512 in tokens else ():
        starts = torch.zeros(2, 512, dtype=torch.bool)
        starts[0, places] = True  # the second row has no separator
        yield from ((starts, window) for window in (0, 126, 127, 128, 255, 511))


def softmax_attention(query, key, value, visible):
    """Attention in float64 as in the textbook, with its scale in the query; visible is (R, T, T)."""
    query, key, value = query.double(), key.double(), value.double()
    return (query @ key.mT).masked_fill(~visible[:, None], -torch.inf).softmax(-1) @ value


def first_key_of(starts, window):
    return first_visible_key(document_starts(starts), window)


def test_first_keys_and_their_rule_are_the_definition():
    for starts, window in layouts(100, (1, 2, 5, 17, 64, 127, 128, 200, 300, 512), seed=1):
        first_key = first_key_of(starts, window)
        position, row = torch.arange(starts.shape[1]), torch.arange(starts.shape[0])[:, None, None]
        seen = interval_rule(first_key)(row, None, position[:, None], position)
        assert torch.equal(seen, dense_mask(starts, window)), (starts.nonzero(), window)
        assert first_key.dtype == torch.int32 and first_key.shape == starts.shape
        assert (first_key.diff(dim=1) >= 0).all()


def seen_in(spans, rows: int, tokens: int) -> torch.Tensor:
    """Spans -> (R, T, T) bool. Every query is in exactly one of them."""
    seen, visits = torch.zeros(rows, tokens, tokens, dtype=torch.bool), torch.zeros(tokens)
    for queries, keys, visible in spans:
        seen[:, queries, keys] = visible[:, 0]
        visits[queries] += 1
    assert (visits == 1).all()
    return seen


@pytest.mark.parametrize("block", [7, 128, 256])
def test_spans_are_the_definition(block):
    for starts, window in layouts(20, (5, 64, 300), seed=block):
        spans = span_mask(first_key_of(starts, window), block)
        assert torch.equal(seen_in(spans, *starts.shape), dense_mask(starts, window))


def test_spans_do_not_read_keys_that_no_row_sees():
    starts = torch.zeros(2, 1024, dtype=torch.bool)
    starts[0, 700] = True
    widths = [keys.stop - keys.start for _, keys, _ in span_mask(first_visible_key(starts, 99), 256)]
    assert widths == [256, 355, 355, 355]


def test_attention_over_spans():
    for starts, window in layouts(8, (40, 256, 400), seed=3):
        draw = torch.Generator().manual_seed(0)
        shape = 3, len(starts), 2, starts.shape[1], 8
        query, key, value = torch.randn(shape, dtype=torch.float64, generator=draw)
        found = attention(query, key, value, span_mask(first_key_of(starts, window)))
        expected = softmax_attention(query, key, value, dense_mask(starts, window))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def grid(numbers: torch.Tensor, lists: torch.Tensor) -> torch.Tensor:
    """Counts (R, 1, N) and lists (R, 1, N, N) -> how often each block is listed, (R, N, N)."""
    blocks = numbers.shape[-1]
    assert numbers.dtype == lists.dtype == torch.int32 and ((numbers >= 0) & (numbers <= blocks)).all()
    assert ((lists >= 0) & (lists < blocks)).all()  # also beyond the count: kernels fetch ahead
    counted = (torch.arange(blocks) < numbers[..., None]).int()
    return torch.zeros_like(lists).scatter_add_(-1, lists.long(), counted)[:, 0]


def assert_blocks(mask, visible: torch.Tensor, size: int = MASK_BLOCK):
    """The lists of a block mask and its rule are those of a mask (R, T, T) bool."""
    rows, tokens, _ = visible.shape
    blocks = tokens // size
    tiles = visible.view(rows, blocks, size, blocks, size).transpose(2, 3).flatten(3)
    full, touched = tiles.all(-1).int(), tiles.any(-1).int()
    assert torch.equal(grid(mask.full_kv_num_blocks, mask.full_kv_indices), full)
    assert torch.equal(grid(mask.kv_num_blocks, mask.kv_indices), touched - full)
    assert torch.equal(grid(mask.full_q_num_blocks, mask.full_q_indices), full.mT)
    assert torch.equal(grid(mask.q_num_blocks, mask.q_indices), (touched - full).mT)
    assert mask.BLOCK_SIZE == (MASK_BLOCK, MASK_BLOCK) and mask.seq_lengths == (tokens, tokens)
    assert torch.equal(create_mask(mask.mask_mod, rows, 1, tokens, tokens, device="cpu")[:, 0], visible)


@pytest.mark.parametrize("count", [20, pytest.param(5000, marks=pytest.mark.slow)])
def test_blocks_are_the_definition(count):
    for starts, window in layouts(count, (128, 256, 384, 512, 640, 768), seed=4):
        for size in (MASK_BLOCK, SMALL_BLOCK):
            assert_blocks(block_mask(first_key_of(starts, window), size), dense_mask(starts, window), size)


ONE_KIND = dict(layers=2, width=256, heads=2, paired_layers=(), short_layers=(), attention_free=(), value_layers=(),
                gated_skip=(), attention_source=(), xsa_layers=())


def test_blocks_are_small_where_their_tiles_are_known(monkeypatch):
    """A mask of small blocks goes with their tiles, and no other. They were timed on Hopper, compute capability
    (9, 0), alone."""
    seen, hopper = [], (9, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for changes, capability, size in (
            ({}, hopper, 64), ({"dtype": "float32"}, hopper, 128), ({"heads": 4}, hopper, 128),
            ({"attention_kernel": "flash"}, hopper, 128), ({}, (8, 9), 128), ({}, (12, 0), 128)):
        config = Config(**{"dtype": "bfloat16"} | ONE_KIND | changes)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        assert block_size(config) == size
        model = SimpleNamespace(blocks=GPT(config, 64).blocks, compiled=True, config=config)
        for training, expected in ((True, size), (False, MASK_BLOCK)):  # validation has long rows, and few
            with torch.set_grad_enabled(training):
                masks = attention_masks(model, torch.zeros(1, 512, dtype=torch.bool), (300, 100))
            assert masks[False, False].kv_indices.shape[-1] == 512 // expected
        kind = getattr(torch, config.dtype), config.width // config.heads
        query, mask = torch.zeros(1, 1, 512, kind[1], dtype=kind[0]), block_mask(torch.zeros(1, 512).int(), size)
        with mock.patch.object(train_gpt2, "flex_attention", lambda *_, kernel_options, **__: seen.append(
                kernel_options)):
            attention(query, query, query, mask, config.attention_kernel)
    assert seen == [SMALL_TILES[torch.bfloat16, 128], {}, {}, {"BACKEND": "FLASH"}, {}, {}]
    assert seen[0]["SPARSE_Q_BLOCK_SIZE"] == seen[0]["SPARSE_KV_BLOCK_SIZE"] == 64
    assert all(64 % tile == 0 for name, tile in seen[0].items() if "BLOCK" in name)


def paired_definition(starts: torch.Tensor, window: int) -> torch.Tensor:
    """(R, T) -> (R, 2 T, 2 T) bool: position n is of token n // 2, in its document; windows count positions."""
    document, places = starts.long().cumsum(1).tolist(), range(2 * starts.shape[1])
    return torch.tensor([[[m <= n and row[m // 2] == row[n // 2] and n - m <= window for m in places]
                          for n in places] for row in document])


@pytest.mark.parametrize("compiled", [False, True])
def test_each_kind_of_layer_gets_its_own_mask(compiled):
    def masks_of(starts, windows, **changes) -> dict:
        config = Config(**dict(heads=4, width=32, xsa_layers=(), dtype="float32") | changes)
        blocks = GPT(config, 64).blocks
        return attention_masks(SimpleNamespace(blocks=blocks, compiled=compiled, config=config), starts, windows)

    all_kinds = dict(layers=5, value_layers=(), short_layers=(0, 1), paired_layers=(1, 3))
    nothing = torch.zeros(1, 128, dtype=torch.bool)
    assert {*masks_of(nothing, (3, 2))} == {(False, False), (True, False), (True, True)}  # (short, paired)
    assert {*masks_of(nothing, (3, 2), **all_kinds, attention_free=(1,))} == {
        (False, False), (True, False), (False, True)}
    draw = np.random.default_rng(6)
    for windows in ((40, 9), (1, 0), (128, 126), (178, 127), (500, 255)):
        starts = random_starts(2, int(draw.choice([128, 256] if compiled else [5, 40, 70])), draw)
        masks = masks_of(starts, windows, **all_kinds, attention_free=(2,))
        assert len(masks) == 4
        for (short, paired), mask in masks.items():
            expected = (paired_definition if paired else dense_mask)(starts, windows[short])
            if compiled:
                assert_blocks(mask, expected)
            else:
                assert torch.equal(seen_in(mask, *expected.shape[:2]), expected)


@pytest.mark.slow
def test_flex_attention_under_the_block_mask():
    """Windows and documents are values at run time: nothing compiles again for other ones."""
    flex = torch.compile(flex_attention, dynamic=False)
    for number, (places, window) in enumerate((((), 999), ((0, 128, 256), 127), ((5, 77), 99), ((128,), 1791))):
        starts, draw = torch.zeros(2, 384, dtype=torch.bool), torch.Generator().manual_seed(window)
        starts[:, list(places)] = True
        starts[1, 300] = True  # the rows differ
        query, key, value = torch.randn(3, 2, 2, 384, 16, generator=draw)
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            found = flex(query, key, value, block_mask=block_mask(first_key_of(starts, window)), scale=1.0)
        expected = softmax_attention(query, key, value, dense_mask(starts, window)).float()
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
