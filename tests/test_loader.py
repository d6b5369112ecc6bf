"""From shard files to rows: TokenStream, rows as they come and of whole documents, shares of processes, prefetching."""

import bisect
import dataclasses
import itertools
import math
import os
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

import train_gpt2
from tools import RECIPE, command, configuration, random_documents, write_corpus, write_shard
from train_gpt2 import (Batch, Config, Processes, Refusal, TokenStream, open_data, open_shard, parse_command_line,
                        prefetched, read_rows, read_tokens, step_batches, step_rows, tokens_needed, tokens_until,
                        training_row)

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
    assert open_shard(tmp_path / "a.bin")[:4] == (str(tmp_path / "a.bin"), 3, 300, 5)
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
    assert [part.dtype for part in batch[:3]] == [torch.int32, torch.int64, torch.bool]
    assert [part.shape for part in batch[:3]] == [(3, 64)] * 3
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
    """Carries the batches that a caller handed to `prefetched`."""


def captured_batches(monkeypatch, caller, *arguments):
    """What `caller` hands to `prefetched`: its batches, in host memory. Nothing is computed."""
    def stop(batches, processes):
        raise Captured(batches)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "prefetched", stop)
        patch.setattr(train_gpt2.dist, "broadcast", lambda *_: None)
        patch.setattr(Processes, "gathered", lambda processes, value: [value] * processes.world)
        patch.setattr(Processes, "told", lambda _, value: value)
        with pytest.raises(Captured) as caught:
            caller(*arguments)
    return caught.value.args[0]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_several_readers_of_training_rows_read_what_one_reads(tmp_path, monkeypatch, world):
    folder = write_corpus(tmp_path, train=(900, 1, 2000, 1200))
    config = configuration(folder, steps=4, tokens_per_step=1024)
    tokens = TokenStream(config.train_files).read(0, 4 * 1024 + 1)[0]
    shares = [list(captured_batches(monkeypatch, train_gpt2.train, config, Processes(rank, world, torch.device("cpu"))))
              for rank in range(world)]
    assert {len(batches) for batches in shares} == {4}
    for step in range(4):
        parts = [batches[step] for batches in shares]
        assert all(len(part.inputs) == 8 // world for part in parts)
        assert all([part.dtype for part in batch[:3]] == [torch.int32, torch.int64, torch.bool] for batch in parts)
        joined = Batch(*(torch.cat(column).flatten().numpy() for column in list(zip(*parts, strict=True))[:3]))
        assert np.array_equal(joined.inputs, tokens[1024 * step:1024 * (step + 1)])
        assert np.array_equal(joined.targets, tokens[1024 * step + 1:1024 * (step + 1) + 1])


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("counted", [1, 128, 1999, 2699])
def test_several_readers_of_validation_rows_count_each_token_once(tmp_path, monkeypatch, world, counted):
    config = configuration(write_corpus(tmp_path))
    stream = TokenStream(config.val_files)
    tokens = stream.read(0, counted + 1)[0]
    for micro_rows in (1, 3):
        model = train_gpt2.GPT(dataclasses.replace(config, micro_tokens=micro_rows * 128 + 127), stream.vocabulary,
                               torch.float32)
        shares = [list(captured_batches(monkeypatch, train_gpt2.validate, model, stream, counted, 0,
                                        Processes(rank, world, torch.device("cpu")))) for rank in range(world)]
        assert {len(batches) for batches in shares} == {math.ceil(counted / (128 * micro_rows * world))}
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
    with pytest.raises(Refusal, match=r"part_000\.bin was replaced or written to"):  # what is still there as well
        stream.read(0, 300)
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


def number(batch: Batch) -> int:
    return int(batch.inputs[0, 0])


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_prefetched_batches_come_in_order(count):
    asked = []

    def reading():
        for index in range(count):
            asked.append(index)
            yield numbered(index)

    assert [number(batch) for batch in prefetched(reading(), ALONE)] == list(range(count))
    assert asked == list(range(count))


def test_the_next_batch_is_read_while_this_one_is_in_use():
    started, released, in_time = [threading.Event() for _ in range(4)], threading.Event(), []

    def reading():
        for index in range(4):
            started[index].set()
            if index == 1:
                in_time.append(released.wait(20))  # not done before the consumer has the batch before it in hand
            yield numbered(index)

    batches = prefetched(reading(), ALONE)
    assert number(next(batches)) == 0
    assert started[1].wait(20)
    assert not started[2].is_set()
    released.set()
    time.sleep(0.05)
    assert not started[2].is_set()  # one ahead and no more: memory stays bounded
    assert number(next(batches)) == 1
    assert started[2].wait(20)
    assert in_time == [True]
    batches.close()
    assert not started[3].is_set()


def test_what_the_reading_thread_is_refused_reaches_the_consumer():
    def reading():
        yield from (numbered(0), numbered(1))
        raise Refusal("the shard is gone")

    batches = prefetched(reading(), ALONE)
    assert [number(next(batches)) for _ in range(2)] == [0, 1]
    with pytest.raises(Refusal, match="^the shard is gone$"):
        next(batches)
    assert next(batches, None) is None


def test_reading_happens_in_one_other_thread_that_ends():
    seen, before = [], threading.active_count()

    def reading():
        for index in range(5):
            seen.append(threading.get_ident())
            yield numbered(index)

    list(prefetched(reading(), ALONE))
    assert len(set(seen)) == 1
    assert threading.get_ident() not in seen
    left_early = prefetched(reading(), ALONE)
    next(left_early)
    assert threading.active_count() == before + 1
    left_early.close()
    assert threading.active_count() == before


# ----------------------------------------------------------------------------------------------------------------------
# Which rows a step takes


def documents_of(pieces) -> list[list[int]]:
    """The documents of a stream in order, straight from the definition of where one starts."""
    documents = []
    for token, starts in zip(np.concatenate(pieces).tolist(), document_starts(pieces), strict=True):
        if starts:
            documents.append([])
        documents[-1].append(token)
    return documents


def slow_row(documents, number, tokens, most):
    """The row of `tokens` inputs that begins with that document: of each one as much as fits, at most `most` tokens,
    the rest dropped. Returns its tokens with the last target, where documents start in it, and the next document."""
    row, starts = [], []
    while len(row) < tokens + 1:
        whole = documents[number % len(documents)]
        taken = whole[:min(len(whole), most, tokens + 1 - len(row))]
        starts += [True] + [False] * (len(taken) - 1)
        row, number = row + taken, number + 1
    return row, starts, number


def ends_of(documents) -> list[int]:
    return list(itertools.accumulate(map(len, documents)))


def corpus(tmp_path, seed, count=4000, length=30):
    """A corpus of documents of 1 to some hundred tokens in a few shards: (its stream, its documents)."""
    draw = np.random.default_rng(seed)
    lengths = np.ceil(length * draw.lognormal(-0.5, 1.2, count)).astype(int)
    tokens = random_documents(int(lengths.sum()), seed=seed)
    tokens[tokens == SEPARATOR] = 3
    tokens[np.cumsum([0, *lengths[:-1]])] = SEPARATOR
    pieces = np.split(tokens, np.sort(draw.integers(1, len(tokens), 3)))
    pieces = [piece for piece in pieces if len(piece)]
    return TokenStream(write_shards(tmp_path, pieces)), documents_of(pieces)


@pytest.mark.parametrize("tokens, most", [(8, 5), (8, 100), (20, 7), (64, 30), (64, 0), (300, 64), (1000, 2048)])
@pytest.mark.parametrize("seed", range(3))
def test_rows_of_whole_documents_are_those_of_the_slow_reference(tmp_path, seed, tokens, most):
    pieces = [piece for more in range(4) for piece in random_pieces(100 * seed + more)]
    stream, documents = TokenStream(write_shards(tmp_path, pieces)), documents_of(pieces)
    ends, config = ends_of(documents), Config(document_tokens=most)
    number, position, only_target = 0, 0, 0
    for _ in range(200):  # some rounds through the stream
        row, starts, following = slow_row(documents, number, tokens, most or tokens + 1)
        found, found_starts, after = training_row(stream, position, tokens, config)
        assert found.tolist() == row and found_starts.tolist() == starts
        assert starts[0] and len(row) == tokens + 1
        laps, inside = divmod(following - 1, len(documents))
        assert after == laps * stream.tokens + ends[inside]
        only_target += starts[-1]
        number, position = following, after
    assert number > len(documents)
    assert only_target > 0 or tokens > 20  # short rows often end with a document: then the next gives its first token


def test_a_document_whose_first_token_is_the_last_target_is_used_up(tmp_path):
    documents = [[SEPARATOR, 1, 2], [SEPARATOR, 3, 4, 5, 6], [SEPARATOR, 7, 8], [SEPARATOR, 9], [SEPARATOR, 10, 11, 12]]
    stream = TokenStream(write_shards(tmp_path, [sum(documents, [])]))
    row, starts, after = training_row(stream, 0, 8, Config())
    assert row.tolist() == [SEPARATOR, 1, 2, SEPARATOR, 3, 4, 5, 6, SEPARATOR]
    assert np.flatnonzero(starts).tolist() == [0, 3, 8] and after == 11
    assert training_row(stream, after, 5, Config())[0].tolist() == [SEPARATOR, 9, SEPARATOR, 10, 11, 12]
    assert training_row(stream, after, 5, Config())[2] == 17
    # one token more, and the next document is cut after two tokens; one less, and the row ends with document 1
    assert training_row(stream, 0, 9, Config())[0].tolist()[-2:] == [SEPARATOR, 7]
    assert [training_row(stream, 0, tokens, Config())[2] for tokens in (6, 7, 8, 9, 10, 11)] == [8, 8, 11, 11, 11, 13]


def test_the_last_token_of_a_cut_document_predicts_the_next_ones_first(tmp_path):
    documents = [[SEPARATOR, 1, 2, 3, 4, 5], [SEPARATOR, 6], [SEPARATOR, *range(7, 17)], [SEPARATOR, 17]]
    stream = TokenStream(write_shards(tmp_path, [sum(documents, [])]))
    config = Config(steps=1, extension=0.0, row_tokens=(9,), tokens_per_step=(9,), document_tokens=4)
    batch = next(step_batches(stream, config, ALONE))
    assert batch.inputs.tolist() == [[SEPARATOR, 1, 2, 3, SEPARATOR, 6, SEPARATOR, 7, 8]]
    assert batch.targets.tolist() == [[1, 2, 3, SEPARATOR, 6, SEPARATOR, 7, 8, 9]]
    assert np.flatnonzero(batch.starts).tolist() == [0, 4, 6]


@pytest.mark.parametrize("tokens, most", [(8, 5), (20, 7), (64, 0), (64, 1), (50, 1000)])
@pytest.mark.parametrize("seed", range(3))
def test_continued_rows_lose_nothing_and_start_documents_at_every_cut(tmp_path, seed, tokens, most):
    pieces = [piece for more in range(3) for piece in random_pieces(50 * seed + more)]
    stream, text = TokenStream(write_shards(tmp_path, pieces)), np.concatenate(pieces)
    opens, config = document_starts(pieces), Config(long_documents="continue", document_tokens=most)
    position, read = 0, []
    while position < 2 * stream.tokens:
        row, starts, after = training_row(stream, position, tokens, config)
        assert after == position + tokens
        assert row.tolist() == [text[at % len(text)] for at in range(position, after + 1)]
        begin = position  # of the document, or of what is left of one
        for at in range(position, after):
            new = at == position or opens[at % len(text)] or (most > 0 and at - begin == most)
            begin = at if new else begin
            assert starts[at - position] == new, at
        read += row[:-1].tolist()
        position = after
    assert read == np.tile(text, 3)[:len(read)].tolist()  # every token once per lap, in order


def recipe(folder, **changes) -> Config:
    return parse_command_line(command(folder, RECIPE, **changes))


SIZES = [(128, 8), (128, 8), (128, 8), (256, 8), (256, 8), (256, 8), *[(384, 8)] * 6]  # row, rows of RECIPE's 12 steps


def test_sizes_of_rows_change_in_the_middle_of_a_run(tmp_path):
    stream, documents = corpus(tmp_path, 1)
    config, number = recipe(tmp_path), 0
    steps = list(step_rows(stream, config))
    assert len(steps) == 12
    for (rows, after), (tokens, count) in zip(steps, SIZES, strict=True):
        assert len(rows) == count
        for row, starts, _ in rows:
            wanted, wanted_starts, number = slow_row(documents, number, tokens, 90)
            assert row.tolist() == wanted and starts.tolist() == wanted_starts
        assert after == (ends_of(documents)[number - 1], 0, 0)
    assert number < len(documents)


@pytest.mark.parametrize("changes", [{}, {"long_documents": "continue"}, {"shuffle": "true"}], ids=str)
def test_rows_do_not_depend_on_the_number_of_processes(tmp_path, changes):
    stream, config = corpus(tmp_path, 2)[0], recipe(tmp_path, **changes)
    whole = list(step_batches(stream, config, ALONE))
    assert [tuple(batch.inputs.shape) for batch in whole] == [(count, tokens) for tokens, count in SIZES]
    for rows, batch in zip(step_rows(stream, config), whole, strict=True):
        assert np.array_equal(batch.inputs, [row[:-1] for row, *_ in rows[0]])
        assert np.array_equal(batch.targets, [row[1:] for row, *_ in rows[0]])
        assert np.array_equal(batch.starts, [starts[:-1] for _, starts, _ in rows[0]])
        assert batch.places == tuple(place for *_, place in rows[0]) and batch.following == rows[1]
        for place, (row, *_) in zip(batch.places, rows[0], strict=True):
            assert np.array_equal(stream.read(place, 20)[0], row[:20])
    for world in (2, 4, 8):
        shares = [step_batches(stream, config, Processes(rank, world, ALONE.device)) for rank in range(world)]
        for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
            assert all(len(part.inputs) == 8 // world for part in parts)
            assert all(torch.equal(torch.cat(column), full)
                       for column, full in zip(list(zip(*parts, strict=True))[:3], batch[:3], strict=True))
            assert sum((part.places for part in parts), ()) == batch.places
            assert {part.following for part in parts} == {batch.following}


def test_steps_can_be_taken_from_any_one_on_within_a_stage(tmp_path):
    """Warm-up draws batches of later stages from the start of the stream: their sizes are those of the stage."""
    stream, config = corpus(tmp_path, 3)[0], recipe(tmp_path)
    for first in (0, 3, 6, 11):
        rows, _ = next(step_rows(stream, config, first))
        assert [len(row) - 1 for row, *_ in rows] == [SIZES[first][0]] * 8
        assert np.array_equal(rows[0][0], training_row(stream, 0, SIZES[first][0], config)[0])
    assert len(list(step_rows(stream, config, 9))) == 3


def written(folder, documents) -> TokenStream:
    """These documents over two shards, the second of which begins with one."""
    half = len(documents) // 2
    for name, part in (("text_train_0.bin", documents[:half]), ("text_train_1.bin", documents[half:])):
        write_shard(folder / name, sum(part, []), 257, SEPARATOR)
    return TokenStream(str(folder / "text_train_*.bin"))


@pytest.mark.parametrize("cap", [0, 40, 90])
def test_the_tokens_a_run_needs_are_exactly_those_it_reads(tmp_path, cap):
    stream, documents = corpus(tmp_path, 4)
    write_shard(tmp_path / "text_val_0.bin", random_documents(2000), 257, SEPARATOR)
    config = recipe(tmp_path, document_tokens=cap)
    needed = tokens_needed(stream, config)
    used = bisect.bisect_left(ends_of(documents), needed) + 1
    assert ends_of(documents)[used - 1] == needed < stream.tokens
    rows = [row[0].tolist() for rows, _ in step_rows(stream, config) for row in rows]
    exact = written(tmp_path, documents[:used])
    assert exact.tokens == needed == tokens_needed(exact, config)
    assert open_data(config)[0].tokens == needed
    assert [row[0].tolist() for rows, _ in step_rows(exact, config) for row in rows] == rows
    short = written(tmp_path, documents[:used - 1])
    assert tokens_needed(short, config) > short.tokens
    with pytest.raises(Refusal, match=f"training tokens, .* holds {short.tokens:,}"):
        open_data(config)
    assert open_data(dataclasses.replace(config, repeat=True))[0].tokens == short.tokens
    last = [row[0].tolist() for rows, _ in step_rows(short, config) for row in rows]
    assert last[:-1] == rows[:-1] and last[-1] != rows[-1]


def test_continued_rows_need_the_tokens_of_all_steps_and_one_target(tmp_path):
    write_shard(tmp_path / "text_val_0.bin", random_documents(2000), 257, SEPARATOR)
    config = recipe(tmp_path, long_documents="continue")
    needed = 3 * 1024 + 3 * 2048 + 6 * 3072 + 1
    assert tokens_until(12, config) + 1 == needed
    text = random_documents(needed)
    write_shard(tmp_path / "text_train_0.bin", text, 257, SEPARATOR)
    stream = open_data(config)[0]
    assert tokens_needed(stream, config) == needed
    targets = np.concatenate([row[0][1:] for rows, _ in step_rows(stream, config) for row in rows])
    assert np.array_equal(targets, text[1:])
    write_shard(tmp_path / "text_train_0.bin", text[:-1], 257, SEPARATOR)
    with pytest.raises(Refusal, match=f"needs {needed:,} training tokens, .* holds {needed - 1:,}"):
        open_data(config)


def test_a_stream_that_is_used_up_starts_over(tmp_path):
    pieces = [random_documents(700, seed=1), random_documents(500, seed=2)]
    stream, documents = TokenStream(write_shards(tmp_path, pieces)), documents_of(pieces)
    number = 0
    for rows, _ in step_rows(stream, recipe(tmp_path, repeat="true")):
        for row, starts, _ in rows:
            wanted, wanted_starts, number = slow_row(documents, number, len(row) - 1, 90)
            assert row.tolist() == wanted and starts.tolist() == wanted_starts
    assert number > 5 * len(documents)


# ----------------------------------------------------------------------------------------------------------------------
# Shuffled rows


def numbered_stream(folder, tokens: int) -> TokenStream:
    """A stream in which each token is its own position and nothing separates documents."""
    folder.mkdir(exist_ok=True)
    return TokenStream(str(write_shard(folder / "part_000.bin", np.arange(tokens), 65_536, 65_535)))


def rows_of_steps(stream, config) -> list[int]:
    """Numbers of the rows that the steps take, in order; the rows of `numbered_stream` tell where they begin."""
    return [int(row[0][0]) // config.row_tokens[0] for rows, _ in step_rows(stream, config) for row in rows]


FIVE_ROWS = {"row_tokens": 128, "tokens_per_step": 640}


def test_in_order_rows_follow_each_other(tmp_path):
    config = configuration(tmp_path, shuffle="false", steps=9, **FIVE_ROWS)
    assert rows_of_steps(numbered_stream(tmp_path, 10_000), config) == list(range(45))


@pytest.mark.parametrize("tokens, whole", [(7 * 128 + 1, 7), (8 * 128, 7), (20 * 128 + 50, 20), (129, 1)])
def test_shuffled_every_whole_row_is_dealt_out_once_per_pass(tmp_path, tokens, whole):
    config = configuration(tmp_path, shuffle="true", seed=3, steps=3 * whole, **FIVE_ROWS)
    rows = rows_of_steps(numbered_stream(tmp_path, tokens), config)  # 15 passes; steps straddle their borders
    passes = [rows[begin:begin + whole] for begin in range(0, len(rows), whole)]
    assert len(passes) == 15 and all(sorted(one) == list(range(whole)) for one in passes)
    assert whole == 1 or len(set(map(tuple, passes))) > 10  # each in another order


def test_the_seed_decides_the_order(tmp_path):
    stream, settings = numbered_stream(tmp_path, 100 * 128 + 1), {"shuffle": "true", "steps": 20, **FIVE_ROWS}
    first, again, other = (rows_of_steps(stream, configuration(tmp_path, **settings, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_shuffled_rows_of_whole_documents_are_those_in_order(tmp_path):
    """Each row that lies within the stream once per deal; the last one, which the end cuts, in none."""
    pieces = [random_documents(3000, seed=6)]
    stream, documents = TokenStream(write_shards(tmp_path, pieces)), documents_of(pieces)
    in_order, number = [], 0
    while number < len(documents):
        row, _, number = slow_row(documents, number, 128, 50)
        in_order.append(tuple(row))
    assert number > len(documents)  # the last row runs on into the first document
    in_order.pop()
    count = len(in_order)
    changes = {"row_tokens": 128, "tokens_per_step": 128 * count, "steps": 3, "extension": 0}
    config = recipe(tmp_path, shuffle="true", document_tokens=50, **changes)
    deals = [[tuple(row.tolist()) for row, *_ in rows] for rows, _ in step_rows(stream, config)]
    assert all(Counter(deal) == Counter(in_order) for deal in deals)
    assert deals[0] != deals[1] != deals[2] and deals[0] != in_order


def test_a_new_size_of_rows_is_dealt_anew(tmp_path):
    config = recipe(tmp_path, shuffle="true", long_documents="continue", document_tokens=0, seed=5)
    stream = numbered_stream(tmp_path, 24 * 384 + 1)
    by_size = {tokens: [] for tokens, _ in SIZES}
    for (rows, _), (tokens, count) in zip(step_rows(stream, config), SIZES, strict=True):
        assert len(rows) == count
        for row, *_ in rows:
            assert row[0] % tokens == 0 and np.array_equal(row, np.arange(row[0], row[0] + tokens + 1))
            by_size[tokens].append(int(row[0]) // tokens)
    assert [len(set(rows)) for rows in by_size.values()] == [24, 24, 24]  # 48 rows of the last size: 24 twice
    assert sorted(by_size[384]) == sorted([*range(24)] * 2)
