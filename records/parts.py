"""Speed of the two parts that run on the host, on one core: the block masks and the loader.

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
from timing import documents, made_up_tokens  # noqa: E402

from train_gpt2 import (  # noqa: E402
    GPT2_SEPARATOR,
    GPT2_VOCABULARY,
    SMALL_BLOCK,
    Config,
    TokenStream,
    block_mask,
    first_visible_key,
    preset_values,
    row_lengths,
    training_row,
    validation_rows,
    value_at,
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


if __name__ == "__main__":
    Parser(description=__doc__.splitlines()[0]).parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    main()
