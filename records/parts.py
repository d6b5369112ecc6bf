"""Speed of the block masks and of the loader, on one core; and how much smaller blocks of the mask save.

    python records/parts.py
"""

import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "data"), str(HERE)]
from text import Encoding, Parser, write_shard  # noqa: E402
from timing import attending, documents, made_up_tokens  # noqa: E402

from train_gpt2 import (  # noqa: E402
    GPT2_SEPARATOR,
    GPT2_VOCABULARY,
    MASK_BLOCK,
    SMALL_BLOCK,
    Config,
    TokenStream,
    block_mask,
    first_visible_key,
    preset_values,
    row_lengths,
    stage_borders,
    training_row,
    validation_rows,
    value_at,
    windows_at,
)

ROW, ROWS = 65_536, 64  # tokens; rows that the loader reads


def best_of(times, run):
    """Seconds of the fastest of several runs, after one that is not timed."""
    seconds = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def packed(stream: TokenStream, config: Config) -> int:
    """Tokens of ROWS rows in training, each read where the one before ended."""
    position = 0
    for _ in range(ROWS):
        position = training_row(stream, position, (ROW, row_lengths(1, config)[1]), config)[-1]
    return ROWS * ROW


def visited(stream: TokenStream, config: Config, stage: int) -> float:
    """How much of what FlexAttention visits with blocks of 128 it visits with blocks of 64, over all layers."""
    lengths, tokens = row_lengths(stage, config), {MASK_BLOCK: 0, SMALL_BLOCK: 0}
    starts, position = [], 0
    while len(starts) * lengths[0] < value_at(config.tokens_per_step, stage):
        _, begins, position = training_row(stream, position, lengths, config)
        starts.append(torch.from_numpy(begins[:-1]))
    windows = windows_at(stage_borders(config)[stage], config)
    for (short, paired), layers in attending(config).items():
        first_key = first_visible_key(documents(torch.stack(starts), paired), windows[short])
        for side in tokens:
            mask = block_mask(first_key, side)
            blocks = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
            tokens[side] += layers * blocks * side**2 // (1 + paired)  # half as many heads
    return tokens[SMALL_BLOCK] / tokens[MASK_BLOCK]


def main() -> None:
    torch.set_num_threads(1)
    starts = torch.from_numpy(made_up_tokens(ROW) == GPT2_SEPARATOR)[None]
    for name, paired, window in (("block mask", False, 1023),
                                 ("block mask of paired heads", True, value_at(Config.window_short, 3))):
        seconds = best_of(50, lambda paired=paired, window=window: block_mask(
            first_visible_key(documents(starts, paired), window), SMALL_BLOCK))
        print(f"{name}, {ROW:,} tokens, window {window}: {1000 * seconds:.2f} ms on one core")
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "shard.bin"
        write_shard(shard, iter([made_up_tokens(2 * ROWS * ROW)]), Encoding(GPT2_VOCABULARY, GPT2_SEPARATOR, None))
        stream, whole = TokenStream(str(shard)), Config()
        cut = Config(**preset_values("five-minute"))
        for name, read in (
                ("validation rows",
                 lambda: [validation_rows(stream, i * ROW, 1, ROW, ROWS * ROW) for i in range(ROWS)]),
                ("rows of whole documents, the rest dropped", lambda: packed(stream, whole)),
                ("rows cut where they end, the rest continued", lambda: packed(stream, cut))):
            speed = ROWS * ROW / best_of(3, read) / 1e6
            print(f"loader, {name}: {speed:.0f} million tokens/s from the page cache on one core")
        shares = ", ".join(f"{visited(stream, whole, stage):.3f}" for stage in range(3))
        print(f"attention visits with blocks of 64, by stage: {shares} of what it does with blocks of 128")


if __name__ == "__main__":
    Parser(description=__doc__.splitlines()[0]).parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    main()
