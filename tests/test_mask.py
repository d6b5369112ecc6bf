"""Which key each query may see: first keys, spans and block masks against the definition, and FlexAttention on top."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tools import dense_mask, random_starts
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from train_gpt2 import (MASK_BLOCK, Config, attend, attention_masks, block_mask, first_visible_key, interval_rule,
                        layer_plan, span_mask)

WINDOWS = (0, 1, 2, 30, 63, 99, 126, 127, 128, 254, 255, 256, 383, 511, 999, 100_000, 2**40)


def random_layouts(count: int, tokens: tuple[int, ...], seed: int):
    """Yield (starts, window): one to three rows of one of the given lengths."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        rows, length, window = int(draw.integers(1, 4)), int(draw.choice(tokens)), int(draw.choice(WINDOWS))
        yield random_starts(rows, length, draw), window


def hand_made_layouts():
    """Documents that end on block borders and one token beside them, with the windows where blocks fill up exactly."""
    for borders in ([], [0], [128], [256], [127, 129], [128, 256, 384], [1, 255, 257, 511], [383, 384, 385]):
        starts = torch.zeros(2, 512, dtype=torch.bool)
        starts[0, borders] = True  # the second row is one headless document
        yield from ((starts, window) for window in (0, 126, 127, 128, 255, 510, 511, 512))


def softmax_attention(query, key, value, visible):
    """Attention in float64 as in the textbook; visible is (R, T, T)."""
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.mT * query.shape[-1]**-0.5
    return scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1) @ value


# ---- first keys and the rule -----------------------------------------------------------------------------------------


def test_interval_is_the_definition():
    lengths = (1, 2, 5, 17, 64, 127, 128, 200, 300)
    for starts, window in [*random_layouts(400, lengths, seed=1), *hand_made_layouts()]:
        first_key = first_visible_key(starts, window)
        position = torch.arange(starts.shape[1])
        row = torch.arange(starts.shape[0])[:, None, None]
        seen = interval_rule(first_key)(row, None, position[:, None], position)
        assert torch.equal(seen, dense_mask(starts, window)), (starts.nonzero(), window)


def test_first_key_is_int32_and_never_decreases():
    for starts, window in random_layouts(100, (64, 200), seed=2):
        first_key = first_visible_key(starts, window)
        assert first_key.dtype == torch.int32 and first_key.shape == starts.shape
        assert (first_key.diff(dim=1) >= 0).all() and (first_key <= torch.arange(starts.shape[1])).all()


# ---- spans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 128, 256])
def test_spans_cover_every_query_once_and_hide_nothing(block):
    for starts, window in random_layouts(60, (5, 64, 300, 512), seed=block):
        rows, tokens = starts.shape
        seen, visits = torch.zeros(rows, tokens, tokens, dtype=torch.bool), torch.zeros(tokens, dtype=torch.int)
        for span in span_mask(first_visible_key(starts, window), block):
            seen[:, span.queries, span.keys] = span.visible[:, 0]
            visits[span.queries] += 1
        assert (visits == 1).all() and torch.equal(seen, dense_mask(starts, window))


def test_spans_do_not_read_keys_that_no_row_sees():
    starts = torch.zeros(2, 1024, dtype=torch.bool)
    starts[0, 700] = True
    widths = [span.keys.stop - span.keys.start for span in span_mask(first_visible_key(starts, 99), 256)]
    assert widths == [256, 355, 355, 355]


def test_attention_over_spans():
    torch.manual_seed(0)
    for starts, window in [*random_layouts(12, (40, 256, 600), seed=3), *list(hand_made_layouts())[::9]]:
        rows, tokens = starts.shape
        query, key, value = torch.randn(3, rows, 2, tokens, 8, dtype=torch.float64)
        found = attend(query * 8**-0.5, key, value, span_mask(first_visible_key(starts, window)))
        expected = softmax_attention(query, key, value, dense_mask(starts, window))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# ---- block masks -----------------------------------------------------------------------------------------------------


def grid(numbers: torch.Tensor, lists: torch.Tensor) -> torch.Tensor:
    """Counts (R, 1, N) and lists (R, 1, N, N) -> how often each block is listed, (R, N, N)."""
    blocks = numbers.shape[-1]
    assert numbers.dtype == lists.dtype == torch.int32
    assert ((numbers >= 0) & (numbers <= blocks)).all()
    assert ((lists >= 0) & (lists < blocks)).all()  # also beyond the count: kernels fetch ahead
    listed = torch.zeros(len(numbers), blocks, blocks, dtype=torch.int)
    for row, one in enumerate(listed):
        for block in range(blocks):
            for other in lists[row, 0, block, :numbers[row, 0, block]].tolist():
                one[block, other] += 1
    return listed


def tiles(visible: torch.Tensor) -> torch.Tensor:
    """(R, T, T) -> (R, N, N, pairs in a block)."""
    rows, tokens, _ = visible.shape
    blocks = tokens // MASK_BLOCK
    parts = visible.view(rows, blocks, MASK_BLOCK, blocks, MASK_BLOCK).transpose(2, 3)
    return parts.reshape(rows, blocks, blocks, MASK_BLOCK**2)


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_blocks_are_exactly_those_of_the_definition(count):
    for starts, window in [*random_layouts(count, (128, 256, 384, 640, 768), seed=4), *hand_made_layouts()]:
        mask = block_mask(first_visible_key(starts, window))
        inside = tiles(dense_mask(starts, window))
        full, touched = inside.all(-1).int(), inside.any(-1).int()
        assert torch.equal(grid(mask.full_kv_num_blocks, mask.full_kv_indices), full)
        assert torch.equal(grid(mask.kv_num_blocks, mask.kv_indices), touched - full)
        assert torch.equal(grid(mask.full_q_num_blocks, mask.full_q_indices), full.mT)
        assert torch.equal(grid(mask.q_num_blocks, mask.q_indices), (touched - full).mT)
        assert mask.BLOCK_SIZE == (MASK_BLOCK, MASK_BLOCK) and mask.seq_lengths == starts.shape[1:] * 2


def definition(starts: torch.Tensor, window: int):
    """The mask as a function that torch's own builders take."""
    document = starts.long().cumsum(1)

    def visible(row, head, query, key):
        return (key <= query) & (document[row, query] == document[row, key]) & (query - key <= window)

    return visible


def test_blocks_agree_with_torch():
    for starts, window in [*random_layouts(12, (384, 512), seed=5), *list(hand_made_layouts())[::5]]:
        rows, tokens = starts.shape
        ours = block_mask(first_visible_key(starts, window))
        visible = definition(starts, window)
        theirs = create_block_mask(visible, rows, 1, tokens, tokens, device="cpu", BLOCK_SIZE=MASK_BLOCK)
        for side in ("kv", "full_kv", "q", "full_q"):
            names = f"{side}_num_blocks", f"{side}_indices"
            assert torch.equal(grid(*(getattr(ours, name) for name in names)),
                               grid(*(getattr(theirs, name) for name in names))), side
        assert torch.equal(create_mask(ours.mask_mod, rows, 1, tokens, tokens, device="cpu")[:, 0],
                           dense_mask(starts, window))


# ---- one mask for each kind of layer ---------------------------------------------------------------------------------


def paired_definition(starts: torch.Tensor, window: int) -> torch.Tensor:
    """(R, T) -> (R, 2 T, 2 T) bool, pair by pair: index n is token n // 2, in its document; windows count indices."""
    document, places = starts.long().cumsum(1).tolist(), range(2 * starts.shape[1])
    return torch.tensor([[[m <= n and row[m // 2] == row[n // 2] and n - m <= window for m in places] for n in places]
                         for row in document])


def masks_of(starts: torch.Tensor, windows: tuple[int, int], compiled: bool, **changes) -> dict:
    """`attention_masks` for the layers of a configuration, without the weights of a model."""
    config = Config(**changes)
    return attention_masks(SimpleNamespace(config=config, plan=layer_plan(config), compiled=compiled), starts, windows)


def test_each_kind_of_layer_gets_its_own_mask():
    plan = dict(layers=5, value_layers=(), short_layers=(0, 1), paired_layers=(1, 3))
    assert set(masks_of(torch.zeros(1, 128, dtype=torch.bool), (3, 2), False)) == {
        (False, False), (True, False), (True, True)}  # the hundred-second recipe has no paired layer with a long window
    assert set(masks_of(torch.zeros(1, 128, dtype=torch.bool), (3, 2), False, **plan, attention_free=(1,))) == {
        (False, False), (True, False), (False, True)}
    draw = np.random.default_rng(6)
    for long, short in ((40, 9), (1, 0), (150, 64), (500, 255)):
        starts = random_starts(2, int(draw.choice([5, 40, 70])), draw)
        masks = masks_of(starts, (long, short), False, **plan, attention_free=(2,))
        assert len(masks) == 4
        for (is_short, is_paired), spans in masks.items():
            expected = (paired_definition if is_paired else dense_mask)(starts, short if is_short else long)
            seen = torch.zeros_like(expected)
            for span in spans:
                seen[:, span.queries, span.keys] = span.visible[:, 0]
            assert torch.equal(seen, expected), (is_short, is_paired)


def test_blocks_of_paired_layers_are_those_of_the_definition():
    draw = np.random.default_rng(7)
    for window in (0, 30, 126, 127, 128, 255, 1000):
        starts = random_starts(2, int(draw.choice([128, 256])), draw)
        masks = masks_of(starts, (window + 50, window), True, layers=2, short_layers=(0,), paired_layers=(0,),
                         attention_free=(), value_layers=())
        for (_, is_paired), mask in masks.items():
            visible = paired_definition(starts, window) if is_paired else dense_mask(starts, window + 50)
            inside, tokens = tiles(visible), visible.shape[-1]
            full, touched = inside.all(-1).int(), inside.any(-1).int()
            assert torch.equal(grid(mask.full_kv_num_blocks, mask.full_kv_indices), full)
            assert torch.equal(grid(mask.kv_num_blocks, mask.kv_indices), touched - full)
            assert torch.equal(grid(mask.full_q_num_blocks, mask.full_q_indices), full.mT)
            assert torch.equal(grid(mask.q_num_blocks, mask.q_indices), (touched - full).mT)
            rule = create_mask(mask.mask_mod, len(starts), 1, tokens, tokens, device="cpu")[:, 0]
            assert torch.equal(rule, visible) and mask.seq_lengths == (tokens, tokens)


# ---- FlexAttention, compiled for the CPU (forward only; it has no backward there) ------------------------------------


@pytest.fixture(scope="module")
def compiled_flex():
    """(starts, window) -> largest deviation of compiled FlexAttention from the textbook."""
    flex = torch.compile(flex_attention, dynamic=False)

    @torch.no_grad()
    def deviation(starts, window) -> float:
        query, key, value = torch.randn(3, len(starts), 2, 384, 16, generator=torch.Generator().manual_seed(window))
        found = flex(query, key, value, block_mask=block_mask(first_visible_key(starts, window)))
        return (found - softmax_attention(query, key, value, dense_mask(starts, window))).abs().max().item()

    return deviation


def starts_at(*places) -> torch.Tensor:
    """(2, 384): documents of the first row; the second row has one more, at 300."""
    starts = torch.zeros(2, 384, dtype=torch.bool)
    starts[:, list(places)] = True
    starts[1, 300] = True
    return starts


@pytest.mark.parametrize("places, window", [((), 999), ((0, 128, 256), 127), ((5, 77), 99)])
def test_flex_attention_under_the_block_mask(compiled_flex, places, window):
    assert compiled_flex(starts_at(*places), window) < 2e-6


@pytest.mark.parametrize("row", [0, 1])
def test_flex_attention_with_a_single_row(compiled_flex, row):  # the shape of the five-minute run
    assert compiled_flex(starts_at(5, 77)[row:row + 1], 99) < 2e-6


def test_window_and_documents_are_runtime_values(compiled_flex):
    compiled_flex(starts_at(), 63)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert compiled_flex(starts_at(1, 200), 99) < 2e-6
        assert compiled_flex(starts_at(128), 1791) < 2e-6
