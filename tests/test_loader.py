"""From shard files to rows: TokenStream, read_rows, read_tokens, the slices of several readers, and prefetching."""

import math
import os
import threading
import time

import numpy as np
import pytest
import torch

import train_gpt2
from tools import configuration, random_documents, write_corpus, write_shard
from train_gpt2 import (Batch, Processes, Refusal, TokenStream, open_shard, prefetched, read_rows, read_tokens,
                        row_positions)

ALONE = Processes(0, 1, torch.device("cpu"))
SEPARATOR = 256


def write_shards(folder, pieces, vocabulary=257, separator=SEPARATOR) -> str:
    """One shard per piece, named in order. Returns the glob."""
    for number, tokens in enumerate(pieces):
        write_shard(folder / f"part_{number:03}.bin", tokens, vocabulary, separator)
    return str(folder / "part_*.bin")


def random_pieces(seed: int) -> list[np.ndarray]:
    """One to five shards of 1 to 400 tokens; about every third has no separator."""
    draw = np.random.default_rng(seed)
    pieces = []
    for number in range(draw.integers(1, 6)):
        piece = random_documents(int(draw.integers(1, 400)), seed=1000 * seed + number, length=40)
        if draw.random() < 1 / 3:
            piece[piece == SEPARATOR] = 7
        elif draw.random() < 1 / 2:
            piece[0] = 7  # its first document began in the shard before
        pieces.append(piece)
    return pieces


def document_starts(pieces) -> np.ndarray:
    """Where documents start in the concatenation, one token after the other, straight from the definition."""
    starts = []
    for number, piece in enumerate(pieces):
        one_document = SEPARATOR not in piece
        after_one = number > 0 and SEPARATOR not in pieces[number - 1]
        for inside, token in enumerate(piece):
            starts.append(token == SEPARATOR or inside == 0 and (number == 0 or one_document or after_one))
    return np.array(starts)


# ----------------------------------------------------------------------------------------------------------------------
# The stream


def test_a_shard_is_a_header_of_256_words_and_16_bit_tokens(tmp_path):
    header = np.zeros(256, "<i4")
    header[:5] = 20240520, 1, 3, 300, 5
    (tmp_path / "a.bin").write_bytes(header.tobytes() + np.array([7, 5, 299], "<u2").tobytes())
    assert open_shard(tmp_path / "a.bin") == (str(tmp_path / "a.bin"), 3, 300, 5)
    assert read_tokens(open_shard(tmp_path / "a.bin"), 1, 2).tolist() == [5, 299]


def test_zero_vocabulary_and_separator_mean_gpt2(tmp_path):
    stream = TokenStream(str(write_shard(tmp_path / "a.bin", [50256, 17, 0, 50256, 3])))
    assert (stream.vocabulary, stream.separator) == (50257, 50256)
    assert stream.read(0, 5)[1].tolist() == [True, False, False, True, False]


def test_a_separator_of_zero_with_a_small_vocabulary_is_token_zero(tmp_path):
    stream = TokenStream(str(write_shard(tmp_path / "a.bin", [3, 0, 5], vocabulary=10)))
    assert (stream.vocabulary, stream.separator) == (10, 0)
    assert stream.read(0, 3)[1].tolist() == [True, True, False]


def test_every_token_once_in_the_order_of_sorted_names(tmp_path):
    tokens = random_documents(1000)
    for name, part in (("b", tokens[300:310]), ("a", tokens[:300]), ("c10", tokens[310:700]), ("c9", tokens[700:])):
        write_shard(tmp_path / f"{name}.bin", part, 257, SEPARATOR)
    stream = TokenStream(str(tmp_path / "*.bin"))
    assert stream.tokens == 1000
    assert np.array_equal(stream.read(0, 1000)[0], tokens)


@pytest.mark.parametrize("seed", range(25))
def test_a_read_anywhere_equals_the_concatenation(tmp_path, seed):
    pieces = random_pieces(seed)
    tokens, starts = np.concatenate(pieces), document_starts(pieces)
    stream, draw, total = TokenStream(write_shards(tmp_path, pieces)), np.random.default_rng(seed), len(tokens)
    borders = np.cumsum([len(piece) for piece in pieces])
    positions = [0, total - 1, total, 3 * total - 1, *draw.integers(0, 2 * total, 10)]
    positions += [max(0, int(border) + offset) for border in borders for offset in (-1, 0, 1)]
    for position in positions:
        for count in (0, 1, 2, int(draw.integers(1, 100)), int(draw.integers(1, 3 * total))):
            at = (position + np.arange(count)) % total
            read, begins = stream.read(int(position), count)
            assert read.dtype == np.uint16 and begins.dtype == bool
            assert np.array_equal(read, tokens[at]), (position, count)
            assert np.array_equal(begins, starts[at]), (position, count)


def test_documents_run_on_across_shards_that_hold_separators(tmp_path):
    pattern = write_shards(tmp_path, [[1, SEPARATOR, 2], [3, SEPARATOR, 4]])
    assert TokenStream(pattern).read(0, 6)[1].tolist() == [True, True, False, False, True, False]


def test_a_shard_without_separator_is_one_document(tmp_path):
    pattern = write_shards(tmp_path, [[SEPARATOR, 1], [2, 3], [4, SEPARATOR], [5, SEPARATOR]])
    assert TokenStream(pattern).read(0, 8)[1].tolist() == [True, False, True, False, True, True, False, True]


def test_starting_over_opens_a_document(tmp_path):
    stream = TokenStream(write_shards(tmp_path, [[1, SEPARATOR], [2, SEPARATOR, 3]]))
    tokens, starts = stream.read(3, 9)
    assert tokens.tolist() == [SEPARATOR, 3, 1, SEPARATOR, 2, SEPARATOR, 3, 1, SEPARATOR]
    assert starts.tolist() == [True, False, True, True, False, True, False, True, True]


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def test_rows_follow_each_other_and_targets_are_the_next_tokens(tmp_path):
    pieces = [random_documents(130, seed=1), random_documents(270, seed=2)]
    tokens, starts = np.concatenate(pieces), document_starts(pieces)
    batch = read_rows(TokenStream(write_shards(tmp_path, pieces)), 10, 3, 64, 10 + 3 * 64)
    assert [part.dtype for part in batch] == [torch.int32, torch.int64, torch.bool]
    assert [part.shape for part in batch] == [(3, 64)] * 3
    assert np.array_equal(batch.inputs.flatten(), tokens[10:202])
    assert np.array_equal(batch.targets.flatten(), tokens[11:203])
    assert np.array_equal(batch.starts.flatten(), starts[10:202])


@pytest.mark.parametrize("end", [0, 100, 101, 163, 164, 165, 290, 291, 292, 1000])
def test_inputs_at_the_end_or_later_have_no_target(tmp_path, end):
    tokens = random_documents(400)
    batch = read_rows(TokenStream(write_shards(tmp_path, [tokens])), 100, 3, 64, end)
    counted = min(max(0, end - 100), 3 * 64)
    targets = batch.targets.flatten().numpy()
    assert (targets >= 0).sum() == counted
    assert np.array_equal(targets[:counted], tokens[101:101 + counted])
    assert (targets[counted:] == -1).all()
    assert np.array_equal(batch.inputs.flatten()[:counted], tokens[100:100 + counted])


class Captured(Exception):
    """Carries the load function that a caller handed to `prefetched`, and how many batches it wants."""


def captured_load(monkeypatch, caller, *arguments):
    """What `caller` hands to `prefetched`: its load function and the number of batches. Nothing is computed."""
    def stop(load, count, processes):
        raise Captured(load, count)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "prefetched", stop)
        patch.setattr(train_gpt2.dist, "broadcast", lambda *_: None)
        with pytest.raises(Captured) as caught:
            caller(*arguments)
    return caught.value.args


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_several_readers_of_training_rows_read_what_one_reads(tmp_path, monkeypatch, world):
    folder = write_corpus(tmp_path, train=(900, 1, 2000, 1200))
    config = configuration(folder, steps=4, tokens_per_step=1024)
    tokens = TokenStream(config.train_files).read(0, 4 * 1024 + 1)[0]
    loads = []
    for rank in range(world):
        processes = Processes(rank, world, torch.device("cpu"))
        load, count = captured_load(monkeypatch, train_gpt2.train, config, processes)
        assert count == 4
        loads.append(load)
    for step in range(4):
        parts = [load(step) for load in loads]
        assert all(len(part.inputs) == 8 // world for part in parts)
        joined = Batch(*(torch.cat(column).flatten().numpy() for column in zip(*parts, strict=True)))
        assert np.array_equal(joined.inputs, tokens[1024 * step:1024 * (step + 1)])
        assert np.array_equal(joined.targets, tokens[1024 * step + 1:1024 * (step + 1) + 1])


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("counted", [1, 128, 1999, 2699])
def test_several_readers_of_validation_rows_count_each_token_once(tmp_path, monkeypatch, world, counted):
    config = configuration(write_corpus(tmp_path))
    stream = TokenStream(config.val_files)
    tokens = stream.read(0, counted + 1)[0]
    model = train_gpt2.GPT(config, stream.vocabulary, torch.float32)
    for micro_rows in (1, 3):
        shares = []
        for rank in range(world):
            processes = Processes(rank, world, torch.device("cpu"))
            load, count = captured_load(monkeypatch, train_gpt2.validate, model, stream, counted, micro_rows, 0,
                                        processes)
            assert count == math.ceil(counted / (128 * micro_rows * world))
            shares.append([load(index) for index in range(count)])
        in_order = [batch for batches in zip(*shares, strict=True) for batch in batches]
        assert all(batch.inputs.shape == (micro_rows, 128) for batch in in_order)
        inputs, targets = (torch.cat([batch[part].flatten() for batch in in_order]).numpy() for part in (0, 1))
        assert np.array_equal(inputs[targets >= 0], tokens[:-1])
        assert np.array_equal(targets[targets >= 0], tokens[1:])


# ----------------------------------------------------------------------------------------------------------------------
# Files that change or lie


def test_a_shard_cut_after_opening_is_refused(tmp_path):
    path = write_shard(tmp_path / "part_000.bin", random_documents(500), 257, SEPARATOR)
    stream = TokenStream(str(path))
    os.truncate(path, 1024 + 2 * 300)
    assert np.array_equal(stream.read(0, 300)[0], random_documents(500)[:300])
    with pytest.raises(Refusal, match=r"part_000\.bin ends at token 300 of 500") as caught:
        stream.read(250, 51)
    assert "\n" not in caught.value.code


def test_a_shard_removed_after_opening_is_refused(tmp_path):
    path = write_shard(tmp_path / "part_000.bin", random_documents(500), 257, SEPARATOR)
    stream = TokenStream(str(path))
    path.unlink()
    with pytest.raises(Refusal, match=r"part_000\.bin can no longer be read: No such file"):
        stream.read(0, 10)


def test_an_impossible_token_is_refused_with_its_shard_and_position(tmp_path):
    tokens = random_documents(2**20 + 100)
    tokens[2**20 + 57] = 257
    path = write_shard(tmp_path / "part_001.bin", tokens, 257, SEPARATOR)
    write_shard(tmp_path / "part_000.bin", random_documents(300), 257, SEPARATOR)
    stream = TokenStream(str(tmp_path / "part_*.bin"))  # opening looks for the first separator only
    assert np.array_equal(stream.read(300 + 2**20, 57)[0], tokens[2**20:2**20 + 57])
    with pytest.raises(Refusal) as caught:
        stream.read(300 + 2**20 - 1000, 1100)
    assert f"{path} holds token 257 at position {2**20 + 57}, beyond its vocabulary of 257" in caught.value.code


# ----------------------------------------------------------------------------------------------------------------------
# Reading ahead


def numbered(index: int) -> Batch:
    return Batch(*(torch.full((1, 2), index) for _ in range(3)))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_prefetched_batches_come_in_order(count):
    asked = []

    def load(index):
        asked.append(index)
        return numbered(index)

    assert [int(batch.inputs[0, 0]) for batch in prefetched(load, count, ALONE)] == list(range(count))
    assert asked == list(range(count))


def test_the_next_batch_is_read_while_this_one_is_in_use():
    started, released, in_time = [threading.Event() for _ in range(4)], threading.Event(), []

    def load(index):
        started[index].set()
        if index == 1:
            in_time.append(released.wait(20))  # not done before the consumer has the batch before it in hand
        return numbered(index)

    batches = prefetched(load, 4, ALONE)
    first = next(batches)
    assert int(first.inputs[0, 0]) == 0
    assert started[1].wait(20)
    assert not started[2].is_set()
    released.set()
    time.sleep(0.05)
    assert not started[2].is_set()  # one ahead and no more: memory stays bounded
    assert int(next(batches).inputs[0, 0]) == 1
    assert started[2].wait(20)
    assert in_time == [True]
    batches.close()


def test_what_the_reading_thread_is_refused_reaches_the_consumer():
    def load(index):
        if index == 2:
            raise Refusal("the shard is gone")
        return numbered(index)

    batches = prefetched(load, 5, ALONE)
    assert [int(next(batches).inputs[0, 0]) for _ in range(2)] == [0, 1]
    with pytest.raises(Refusal, match="^the shard is gone$"):
        next(batches)


def test_reading_happens_in_one_other_thread():
    seen = []

    def load(index):
        seen.append(threading.get_ident())
        return numbered(index)

    list(prefetched(load, 5, ALONE))
    assert len(set(seen)) == 1
    assert threading.get_ident() not in seen


# ----------------------------------------------------------------------------------------------------------------------
# Which rows a step takes


def rows_of_steps(config, stream_tokens: int, steps: int) -> list[int]:
    return [position // config.row_tokens
            for step in range(steps) for position in row_positions(config, stream_tokens, step)]


def test_in_order_rows_follow_each_other(tmp_path):
    config = configuration(tmp_path, shuffle="false", row_tokens=128, tokens_per_step=640)
    assert rows_of_steps(config, 10_000, 9) == list(range(45))


@pytest.mark.parametrize("stream_tokens, whole", [(7 * 128 + 1, 7), (8 * 128, 7), (20 * 128 + 50, 20)])
def test_shuffled_every_whole_row_is_dealt_out_once_per_pass(tmp_path, stream_tokens, whole):
    config = configuration(tmp_path, shuffle="true", row_tokens=128, tokens_per_step=640, seed=3)
    rows = rows_of_steps(config, stream_tokens, 3 * whole)  # 15 passes; steps straddle their borders
    passes = [rows[begin:begin + whole] for begin in range(0, len(rows), whole)]
    assert all(sorted(one) == list(range(whole)) for one in passes)
    assert len(set(map(tuple, passes))) > 10  # each in another order


def test_the_seed_decides_the_order(tmp_path):
    settings = {"shuffle": "true", "row_tokens": 128, "tokens_per_step": 640}
    first, again, other = (rows_of_steps(configuration(tmp_path, **settings, seed=seed), 100 * 128 + 1, 20)
                           for seed in (1, 1, 2))
    assert first == again != other
