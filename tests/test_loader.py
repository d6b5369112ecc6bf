"""From shard files to rows: the stream, rows in order, of whole documents and shuffled, shares, reading ahead."""

import itertools
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tools import (
    ALONE, RECIPE, configuration, made_up_prefixes, random_documents, small_model, write_corpus, write_shard)

import train_gpt2
from train_gpt2 import (
    PREFIXES, Batch, Config, Processes, TokenStream, UserError, holds_run, open_data, open_shard, phase_at, prefetched,
    read_tokens, row_lengths, step_batches, step_rows, tokens_until, training_row, validation_rows)

SEPARATOR = 256


def write_shards(folder, pieces) -> str:
    """One shard per piece, named in order, and prefixes. Returns the glob."""
    folder.mkdir(exist_ok=True)
    made_up_prefixes(257).tofile(folder / PREFIXES)
    for number, tokens in enumerate(pieces):
        write_shard(folder / f"text_train_{number:03}.bin", tokens, 257, SEPARATOR)
    return str(folder / "text_train_*.bin")


def random_pieces(seed: int, count: int = 5) -> list[np.ndarray]:
    """One to `count` shards of 1 to 400 tokens; about every third has no separator."""
    draw, pieces = np.random.default_rng(seed), []
    for number in range(draw.integers(1, count + 1)):
        piece = random_documents(int(draw.integers(1, 400)), seed=1000 * seed + number, length=40)
        piece[0] = draw.choice([7, SEPARATOR])
        if draw.random() < 1 / 3:
            piece[piece == SEPARATOR] = 7
        pieces.append(piece)
    return pieces


def documents_of(tokens) -> list[list[int]]:
    """A document begins with a separator, and with the stream."""
    documents = [[]]
    for token in np.asarray(tokens).tolist():
        if token == SEPARATOR and documents[-1]:
            documents.append([])
        documents[-1].append(token)
    return documents


def starts_of(documents) -> np.ndarray:
    return np.concatenate([np.arange(len(document)) == 0 for document in documents])


# ---- shards and the stream --------------------------------------------------------------------------------


def test_a_shard_is_a_header_of_256_words_and_16_bit_tokens(tmp_path):
    header, path = np.zeros(256, "<i4"), tmp_path / "a.bin"
    header[:5] = 20240520, 1, 3, 300, 5
    path.write_bytes(header.tobytes() + np.array([7, 5, 299], "<u2").tobytes())
    assert open_shard(str(path)) == (str(path), 3, 300, 5)
    assert read_tokens(open_shard(str(path)), 1, 2).tolist() == [5, 299]


@pytest.mark.parametrize("vocabulary, tokens, kind, starts", [
    (0, [50256, 17, 0, 50256, 3], (50257, 50256), [0, 3]), (10, [3, 0, 5], (10, 0), [0, 1])])
def test_zeros_in_the_header(tmp_path, vocabulary, tokens, kind, starts):
    stream = TokenStream(str(write_shard(tmp_path / "a.bin", tokens, vocabulary)))
    assert (stream.vocabulary, stream.separator) == kind
    assert np.flatnonzero(stream.read(0, len(tokens))[1]).tolist() == starts


@pytest.mark.parametrize("problem", ["fifo", "folder", "odd", "short", "empty", "magic", "version", "more", "fewer",
                                     "none", "vocabulary", "separator"])
def test_what_is_no_shard_is_refused_at_once(tmp_path, problem):
    path, header = tmp_path / "a.bin", {"magic": 1, "version": 2, "more": 99, "fewer": 101, "none": 0,
                                        "vocabulary": 70_000, "separator": 257}
    name = "count" if problem in ("more", "fewer", "none") else problem
    write_shard(path, random_documents(100), **{"vocabulary": 257, "separator": 256} | (
        {name: header[problem]} if problem in header else {}))
    if problem in ("odd", "short", "empty"):
        os.truncate(path, {"odd": 1024 + 199, "short": 1000, "empty": 0}[problem])
    if problem in ("fifo", "folder"):
        path.unlink()
        os.mkfifo(path) if problem == "fifo" else path.mkdir()
    signal.alarm(10)  # nobody writes to the fifo: who opens it waits for ever
    try:
        with pytest.raises(UserError) as caught:
            TokenStream(str(path))
    finally:
        signal.alarm(0)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(6))
def test_a_read_anywhere_equals_the_concatenation(tmp_path, seed):
    """In the order of names; borders of shards start no document, the beginning of the stream does."""
    pieces, draw = random_pieces(seed), np.random.default_rng(seed)
    tokens = np.concatenate(pieces)
    starts, total = starts_of(documents_of(tokens)), len(tokens)
    stream = TokenStream(write_shards(tmp_path, pieces))
    assert stream.tokens == total
    positions = [0, total - 1, total, 3 * total - 1, *draw.integers(0, 2 * total, 10)]
    positions += [max(0, border + k) for border in np.cumsum([*map(len, pieces)]) for k in (-1, 0, 1)]
    for position in map(int, positions):
        shard, inside = stream.locate(position)
        assert read_tokens(shard, inside, 1) == tokens[position % total]
        for count in (0, 1, 2, int(draw.integers(1, 100)), int(draw.integers(1, 3 * total))):
            at = (position + np.arange(count)) % total
            read, begins = stream.read(position, count)
            assert read.dtype == np.uint16 and begins.dtype == bool
            assert np.array_equal(read, tokens[at]) and np.array_equal(begins, starts[at]), (position, count)


def test_fingerprints_notice_a_change(tmp_path):
    """Of any token in a shard of up to a million, of any stretch of a 64th in a larger one; and of header and name."""
    tokens, draw = np.tile(random_documents(100_000), 20), np.random.default_rng(0)
    pattern = write_shards(tmp_path, [tokens, tokens[:1_000_000]])
    first = TokenStream(pattern).fingerprints()
    assert first == TokenStream(pattern).fingerprints() and len(first) == 2
    for shard, size, stretch in ((0, 2_000_000, 2_000_000 // 60), (1, 1_000_000, 1)):
        name = [*first][shard]
        for begin in (0, size - stretch, *draw.integers(0, size - stretch, 8)):
            changed = tokens[:size].copy()
            changed[begin:begin + stretch] = (changed[begin:begin + stretch] + 1) % SEPARATOR
            write_shard(tmp_path / f"text_train_{shard:03}.bin", changed, 257, SEPARATOR)
            found = TokenStream(pattern).fingerprints()
            assert {key for key in first if found[key] != first[key]} == {name}, (shard, begin)
        write_shard(tmp_path / f"text_train_{shard:03}.bin", tokens[:size], 257, SEPARATOR)
    kinds = ((257, 256), (300, 256), (257, 255))  # vocabulary and separator
    found = [TokenStream(str(write_shard(tmp_path / "one.bin", tokens[:100], *kind))).fingerprints() for kind in kinds]
    assert found[0] not in found[1:]


def test_files_that_change_after_opening_are_refused(tmp_path):
    tokens = random_documents(500)
    tokens[457] = 257
    path = write_shard(tmp_path / "b.bin", tokens, 257, SEPARATOR)
    write_shard(tmp_path / "a.bin", random_documents(300), 257, SEPARATOR)
    stream = TokenStream(str(tmp_path / "*.bin"))  # an impossible token is met when it is read
    assert np.array_equal(stream.read(300, 457)[0], tokens[:457])
    with pytest.raises(UserError, match=r"b\.bin .* 257 .* 457"):
        stream.read(200, 600)
    os.truncate(path, 1024 + 2 * 300)
    with pytest.raises(UserError, match=r"b\.bin .* 300 .* 500"):
        stream.read(550, 51)
    path.unlink()
    with pytest.raises(UserError, match=r"b\.bin"):
        stream.read(300, 10)


def test_prefixes_are_read_beside_the_shards(tmp_path):
    write_shard(tmp_path / "text_val_0.bin", random_documents(2000), 257, SEPARATOR)
    write_shards(tmp_path, [random_documents(30_000)])
    config, data = recipe(tmp_path, repeat=True), open_data(recipe(tmp_path, repeat=True))
    assert np.array_equal(data.prefixes, made_up_prefixes(257)) and data.prefixes.max() > 0 > data.prefixes.min()
    path, good = tmp_path / PREFIXES, data.prefixes
    changed = good.copy()
    changed[good.argmax()] = -1  # another table is another training set
    changed.tofile(path)
    assert open_data(config).fingerprints != data.fingerprints
    for bad in (good[:-1], np.append(good, 0), np.where(good < 0, -2, good), np.where(good < 0, 257, good)):
        bad.astype("<i4").tofile(path)
        with pytest.raises(UserError, match=PREFIXES):
            open_data(config)
    path.unlink()
    with pytest.raises(UserError, match="--prefix-weight"):
        open_data(config)
    without = open_data(replace(config, prefix_weight=0.0))
    assert without.prefixes is None and not any(PREFIXES in name for name in without.fingerprints)


# ---- rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [0, 100, 101, 163, 164, 165, 290, 291, 292, 1000])
def test_validation_rows_follow_each_other_up_to_the_end(tmp_path, end):
    tokens = np.concatenate([random_documents(130, seed=1), random_documents(270, seed=2)])
    stream = TokenStream(write_shards(tmp_path, np.split(tokens, [130])))
    batch, counted = validation_rows(stream, 100, 3, 64, end), min(max(0, end - 100), 3 * 64)
    assert [(part.dtype, part.shape) for part in batch[:3]] == [
        (dtype, (3, 64)) for dtype in (torch.int32, torch.int64, torch.bool)]
    inputs, targets, starts = (part.flatten().numpy() for part in batch[:3])
    assert np.array_equal(inputs, tokens[100:292]) and np.array_equal(starts, tokens[100:292] == SEPARATOR)
    assert np.array_equal(targets[:counted], tokens[101:101 + counted]) and (targets[counted:] == -1).all()


def slow_row(documents, number, tokens, most):
    """The row of `tokens` inputs that begins with that document: of each one as much as fits, at most
    `most` tokens, and one token more as the last target; where documents start; the next document."""
    row, starts = [], []
    while len(row) < tokens + 1:
        whole = documents[number % len(documents)]
        taken = whole[:min(len(whole), most or tokens + 1, tokens + 1 - len(row))]
        starts += [True] + [False] * (len(taken) - 1)
        row, number = row + taken, number + 1
    return row, starts, number


@pytest.mark.parametrize("tokens, most", [(8, 5), (8, 100), (20, 7), (64, 30), (64, 0), (300, 64), (1000, 2048)])
@pytest.mark.parametrize("seed", range(2))
def test_rows_of_whole_documents_are_those_of_the_slow_reference(tmp_path, seed, tokens, most):
    pieces = [piece for more in range(4) for piece in random_pieces(100 * seed + more)]
    stream, documents = TokenStream(write_shards(tmp_path, pieces)), documents_of(np.concatenate(pieces))
    ends = [*itertools.accumulate(map(len, documents))]
    config = Config(document_tokens=(most,), row_tokens=(tokens,), repeat=True)
    number, position = 0, 0
    for _ in range(150):  # some rounds through the stream
        row, starts, following = slow_row(documents, number, tokens, most)
        found, found_starts, after = training_row(stream, position, row_lengths(0, config), config)
        assert found.tolist() == row and found_starts.tolist() == starts and starts[0]
        laps, inside = divmod(following - 1, len(documents))
        assert after == laps * stream.tokens + ends[inside]
        number, position = following, after
    assert number > len(documents)


def test_one_long_document_makes_no_rows(tmp_path):
    """Of 6 MB of text in one piece, 60 tokens are used: that is said after reading it once."""
    write_shard(tmp_path / "text_val_0.bin", random_documents(2000), 257, SEPARATOR)
    write_shards(tmp_path, [np.append(SEPARATOR, np.ones(6_000_000)).astype(np.uint16)])
    begin = time.perf_counter()
    for changes in ({}, {"shuffle": True}):
        with pytest.raises(UserError, match="too few|no whole row"):
            open_data(recipe(tmp_path, **changes))
    assert time.perf_counter() - begin < 5
    open_data(recipe(tmp_path, long_documents="continue"))


def test_no_shard_is_for_training_and_validation(tmp_path):
    folder = write_corpus(tmp_path / "corpus")
    (tmp_path / "again").symlink_to(folder)
    (tmp_path / "copy.bin").write_bytes((folder / "text_train_000001.bin").read_bytes())
    good = recipe(folder, repeat=True)
    open_data(good)
    for train, val in (("corpus/text_*.bin", "corpus/text_val_*.bin"), ("corpus/text_train_*.bin", "again/*1.bin"),
                       ("corpus/text_train_*.bin", "corpus/text_train_*.bin"),
                       ("corpus/text_train_*.bin", "copy.bin")):
        with pytest.raises(UserError, match="among --train-files"):
            open_data(replace(good, train_files=str(tmp_path / train), val_files=str(tmp_path / val)))


@pytest.mark.parametrize("tokens, most", [(8, 5), (20, 7), (64, 0), (64, 1), (50, 1000)])
def test_continued_rows_lose_nothing_and_start_documents_at_every_cut(tmp_path, tokens, most):
    pieces = [piece for more in range(3) for piece in random_pieces(50 + more)]
    stream, text = TokenStream(write_shards(tmp_path, pieces)), np.concatenate(pieces)
    opens = starts_of(documents_of(text))
    config = Config(long_documents="continue", document_tokens=(most,), row_tokens=(tokens,))
    for position in range(0, 2 * stream.tokens, tokens):
        row, starts, after = training_row(stream, position, row_lengths(0, config), config)
        assert after == position + tokens
        assert row.tolist() == [text[at % len(text)] for at in range(position, after + 1)]
        begin = position  # of the document, or of what is left of one
        for at in range(position, after):
            new = at == position or opens[at % len(text)] or (most > 0 and at - begin == most)
            begin = at if new else begin
            assert starts[at - position] == new, at


# ---- which rows a step takes ------------------------------------------------------------------------------

SIZES = [(128, 8, 60)] * 3 + [(256, 8, 90)] * 3 + [(384, 8, 90)] * 6  # of RECIPE's 12 steps: row, rows, cap
WAYS = [dict(long_documents="drop"), dict(long_documents="continue"), dict(shuffle=True),
        dict(shuffle=True, long_documents="continue")]


def recipe(folder, **changes) -> Config:
    return configuration(folder, RECIPE, **changes)


def lognormal_documents(seed: int, count: int = 4000, length: int = 30) -> np.ndarray:
    """Documents of 1 to some hundred tokens."""
    lengths = np.ceil(length * np.random.default_rng(seed).lognormal(-0.5, 1.2, count)).astype(int)
    tokens = random_documents(int(lengths.sum()), seed=seed)
    tokens[tokens == SEPARATOR] = 3
    tokens[np.cumsum([0, *lengths[:-1]])] = SEPARATOR
    return tokens


def rows_of(stream, config) -> list:
    """All rows of a run by step, as plain values, and where the stream is read next."""
    return [([(row.tolist(), starts.tolist(), position) for row, starts, position in rows], after)
            for rows, after in step_rows(stream, config)]


def tokens_of(stream, config) -> list:
    return [row for rows, _ in rows_of(stream, config) for row, *_ in rows]


def test_sizes_of_rows_change_in_the_middle_of_a_run_and_the_stream_starts_over(tmp_path):
    for count in (4000, 50):
        tokens = lognormal_documents(1, count)
        stream, documents, number = TokenStream(write_shards(tmp_path, [tokens])), documents_of(tokens), 0
        ends = [*itertools.accumulate(map(len, documents))]
        steps = rows_of(stream, recipe(tmp_path, repeat=True))
        assert len(steps) == 12
        for (rows, after), (size, per_step, most) in zip(steps, SIZES, strict=True):
            assert len(rows) == per_step
            for row, starts, _ in rows:
                wanted, wanted_starts, number = slow_row(documents, number, size, most)
                assert row == wanted and starts == wanted_starts
            laps, inside = divmod(number - 1, len(documents))
            assert after == laps * stream.tokens + ends[inside]
    assert number > 5 * len(documents)


@pytest.mark.parametrize("changes", WAYS, ids=str)
def test_rows_depend_neither_on_shards_nor_on_processes(tmp_path, changes):
    text, config, draw = lognormal_documents(2, 1500), recipe(tmp_path, **changes), np.random.default_rng(0)
    stream = TokenStream(write_shards(tmp_path / "1", [text]))
    steps, whole = rows_of(stream, config), list(step_batches(stream, config, ALONE))
    for count in (3, 40):  # shards of the same tokens
        cuts = np.sort(draw.choice(len(text) - 1, count - 1, replace=False)) + 1
        assert rows_of(TokenStream(write_shards(tmp_path / str(count), np.split(text, cuts))), config) == steps
    for (rows, _), batch, (size, count, _) in zip(steps, whole, SIZES, strict=True):
        assert batch.inputs.shape == (count, size)
        assert [part.dtype for part in batch[:3]] == [torch.int32, torch.int64, torch.bool]
        tokens, starts, positions = zip(*rows, strict=True)
        assert batch.inputs.tolist() == [row[:-1] for row in tokens]
        assert batch.targets.tolist() == [row[1:] for row in tokens]
        assert batch.starts.tolist() == [row[:-1] for row in starts]
        assert batch.positions == positions
        for row, position in zip(tokens, positions, strict=True):
            assert stream.read(position, 20)[0].tolist()[0] == row[0]
    for world in (2, 8):
        shares = [step_batches(stream, config, Processes(rank, world, ALONE.device)) for rank in range(world)]
        for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
            for part, full in enumerate(batch[:3]):
                assert torch.equal(torch.cat([share[part] for share in parts]), full)
                assert all(len(share[part]) == 8 // world for share in parts)
            assert sum((share.positions for share in parts), ()) == batch.positions
    for first in (3, 6, 11):  # the warm-up draws from the start of the stream, in the sizes of the stage
        rows, _ = next(step_rows(stream, config, first))
        assert [len(row) - 1 for row, *_ in rows] == [SIZES[first][0]] * 8


@pytest.mark.parametrize("cap", [0, 40])
def test_the_tokens_a_run_needs_are_exactly_those_it_reads(tmp_path, cap):
    tokens, config = lognormal_documents(4), recipe(tmp_path, document_tokens=cap)
    write_shard(tmp_path / "text_val_0.bin", random_documents(2000), 257, SEPARATOR)
    stream = TokenStream(write_shards(tmp_path, [tokens]))
    needed, rows = rows_of(stream, config)[-1][1], tokens_of(stream, config)
    documents = documents_of(tokens[:needed])
    assert needed < stream.tokens and tokens[needed] == SEPARATOR
    write_shards(tmp_path, [tokens[:needed]])
    exact = open_data(config).train
    assert exact.tokens == needed and holds_run(exact, config)
    assert tokens_of(exact, config) == rows
    write_shards(tmp_path, [np.concatenate(documents[:-1])])
    with pytest.raises(UserError, match="--repeat"):
        open_data(config)
    short = open_data(replace(config, repeat=True)).train
    last = tokens_of(short, config)
    assert last[:-1] == rows[:-1] and last[-1] != rows[-1]


def test_continued_rows_need_the_tokens_of_all_steps_and_one_target(tmp_path):
    write_shard(tmp_path / "text_val_0.bin", random_documents(2000), 257, SEPARATOR)
    config, needed = recipe(tmp_path, long_documents="continue"), 3 * 1024 + 3 * 2048 + 6 * 3072 + 1
    assert tokens_until(12, config) + 1 == needed
    text = random_documents(needed)
    write_shards(tmp_path, [text])
    stream = open_data(config).train
    assert holds_run(stream, config)
    assert np.array_equal(np.concatenate([row[1:] for row in tokens_of(stream, config)]), text[1:])
    write_shards(tmp_path, [text[:-1]])
    with pytest.raises(UserError, match="--repeat"):
        open_data(config)


# ---- shuffled rows ----------------------------------------------------------------------------------------


def numbered_stream(folder, tokens: int) -> TokenStream:
    """A stream in which each token is its own position and nothing separates documents."""
    return TokenStream(str(write_shard(folder / "part_000.bin", np.arange(tokens), 65_536, 65_535)))


def numbers_of(stream, config) -> list[int]:
    """The numbers of the rows that the steps take."""
    return [int(row[0]) // config.row_tokens[0] for rows, _ in step_rows(stream, config) for row, *_ in rows]


@pytest.mark.parametrize("tokens, whole", [(7 * 128 + 1, 7), (8 * 128, 7), (20 * 128 + 50, 20), (129, 1)])
def test_every_whole_row_once_per_epoch(tmp_path, tokens, whole):
    settings = dict(row_tokens=128, tokens_per_step=640, steps=3 * whole, seed=3)
    stream = numbered_stream(tmp_path, tokens)
    config, again, other = (configuration(tmp_path, shuffle=True, **settings | dict(seed=seed)) for seed in (3, 3, 4))
    rows = numbers_of(stream, config)  # 15 epochs; steps straddle their borders
    epochs = [tuple(rows[begin:begin + whole]) for begin in range(0, len(rows), whole)]
    assert len(epochs) == 15 and all(sorted(epoch) == list(range(whole)) for epoch in epochs)
    assert whole == 1 or len({*epochs}) > 10  # each in another order
    assert numbers_of(stream, again) == rows and (whole == 1 or numbers_of(stream, other) != rows)
    in_order = numbers_of(numbered_stream(tmp_path, 15 * 20 * 128 + 1), configuration(tmp_path, **settings))
    assert in_order == list(range(15 * whole))


@pytest.mark.parametrize("ends_with_a_row", [False, True])
def test_shuffled_rows_of_whole_documents_are_those_in_order(tmp_path, ends_with_a_row):
    """Each row that lies within the stream once per epoch; one that its end cuts, in none."""
    tokens, in_order, number = random_documents(3000, seed=6), [], 0
    documents = documents_of(tokens)
    while number < len(documents):
        row, _, number = slow_row(documents, number, 128, 50)
        in_order.append((tuple(row), number))
    assert in_order[-1][1] > len(documents)  # the last row runs on into the first document
    if ends_with_a_row:
        tokens = np.concatenate(documents[:in_order[-2][1]])
    in_order = [row for row, _ in in_order[:-1]]
    config = recipe(tmp_path, shuffle=True, document_tokens=50, row_tokens=128, extension=0, steps=3,
                    tokens_per_step=128 * len(in_order))
    stream = TokenStream(write_shards(tmp_path, [tokens]))
    epochs = [[tuple(row) for row, *_ in rows] for rows, _ in rows_of(stream, config)]
    assert all(Counter(epoch) == Counter(in_order) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != in_order


def test_a_stream_without_a_whole_row_of_any_stage_cannot_be_shuffled(tmp_path):
    write_shards(tmp_path, [random_documents(1500, length=300)])
    write_shard(tmp_path / "text_val_0.bin", random_documents(2000), 257, SEPARATOR)
    config = recipe(tmp_path, shuffle=True, repeat=True, document_tokens=60)
    shape = row_lengths(2, config)
    assert training_row(TokenStream(config.train_files), 0, row_lengths(0, config), config)[-1] <= 1500
    with pytest.raises(UserError, match=f"no whole row of {shape[0]}"):
        open_data(config)


def test_a_new_size_of_rows_is_drawn_anew(tmp_path):
    config = recipe(tmp_path, shuffle=True, long_documents="continue", document_tokens=0, seed=5)
    stream, by_size = numbered_stream(tmp_path, 24 * 384 + 1), {size: [] for size, *_ in SIZES}
    for (rows, _), (size, count, _) in zip(step_rows(stream, config), SIZES, strict=True):
        assert len(rows) == count
        for row, *_ in rows:
            assert row[0] % size == 0 and np.array_equal(row, np.arange(row[0], row[0] + size + 1))
            by_size[size].append(int(row[0]) // size)
    assert [len({*rows}) for rows in by_size.values()] == [24, 24, 24]
    assert sorted(by_size[384]) == sorted([*range(24)] * 2)  # 48 rows of the last size: each twice


def test_shuffled_rows_keep_to_the_longest_document_of_their_stage(tmp_path):
    """Also where rows stay as long as they were."""
    tokens = random_documents(3000, seed=6)
    stream, documents = TokenStream(write_shards(tmp_path, [tokens])), documents_of(tokens)
    number_at = {begin: number for number, begin in enumerate([0, *itertools.accumulate(map(len, documents))])}
    config = recipe(tmp_path, shuffle=True, document_tokens="20,50", row_tokens=128, tokens_per_step=512)
    steps = rows_of(stream, config)
    for (rows, _), (*_, most) in zip(steps, SIZES, strict=True):
        for row, starts, position in rows:
            assert slow_row(documents, number_at[position], 128, {60: 20, 90: 50}[most])[:2] == (row, starts)


# ---- validation and reading ahead -------------------------------------------------------------------------


@pytest.mark.parametrize("counted", [1, 128, 999])
def test_validation_is_the_mean_over_the_first_targets_whatever_the_processes(tmp_path, monkeypatch, counted):
    stream, sums = TokenStream(write_shards(tmp_path, [random_documents(1500)])), []
    monkeypatch.setattr(train_gpt2.dist, "all_reduce", lambda total: sums.append(total.item()))
    model = small_model(320, spread=0.3, layers=1, micro_tokens=128)  # no padding
    tokens, starts = stream.read(0, 1025)
    rows = torch.from_numpy(tokens[:-1].astype(int)).view(16, 64).int()
    with torch.no_grad():
        hidden = model(rows, torch.from_numpy(starts[:-1]).view(16, 64), phase_at(0, model.config))
        chances = model.logits(hidden).log_softmax(-1).flatten(0, 1)
    targets = torch.from_numpy(tokens[1:].astype(int))
    expected = -chances.gather(1, targets[:, None])[:counted].sum().item()
    for world in (1, 3):
        sums.clear()
        for rank in range(world):
            loss = train_gpt2.validate(model, stream, counted, 0, Processes(rank, world, torch.device("cpu")))
        total = loss * counted if world == 1 else sum(sums)
        assert total == pytest.approx(expected, rel=1e-9)


def test_one_batch_is_read_ahead_in_a_thread_that_ends():
    started, before = [], threading.active_count()

    def reading(count):
        for number in range(count):
            started.append((number, threading.get_ident()))
            yield Batch(*[torch.full((1, 2), number)] * 3)
        raise UserError("the shard is gone")

    def wait_for(condition):
        end = time.monotonic() + 20
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        return condition()

    batches = prefetched(reading(4), ALONE.device)
    for number in range(3):
        assert int(next(batches).inputs[0, 0]) == number and wait_for(lambda n=number: len(started) == n + 2)
        time.sleep(0.05)
        assert len(started) == number + 2  # one ahead and no more: memory stays bounded
    assert int(next(batches).inputs[0, 0]) == 3
    with pytest.raises(UserError, match="^the shard is gone$"):
        next(batches)
    assert [number for number, _ in started] == [0, 1, 2, 3]
    assert len({thread for _, thread in started} | {threading.get_ident()}) == 2
    left_early = prefetched(reading(4), ALONE.device)
    next(left_early)
    left_early.close()
    assert threading.active_count() == before and not [*prefetched(iter(()), ALONE.device)]
