"""Speed of the two parts that run on the host, on one core: the block mask and the loader.

    python records/parts.py
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "data"), str(HERE)]
from text import Encoding, write_shard  # noqa: E402
from timing import made_up_tokens  # noqa: E402
from train_gpt2 import (GPT2_SEPARATOR, GPT2_VOCABULARY, TokenStream, block_mask, first_visible_key,  # noqa: E402
                        read_rows)

ROW = 65_536  # tokens


def best_of(times: int, run) -> float:
    """Seconds of the fastest of several runs: what the code costs when nothing else is in the way."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def main() -> None:
    torch.set_num_threads(1)
    starts = torch.from_numpy(made_up_tokens(ROW) == GPT2_SEPARATOR)[None]
    seconds = best_of(50, lambda: block_mask(first_visible_key(starts, 1024)))
    print(f"block mask of {ROW:,} tokens: {1000 * seconds:.2f} ms on one core")
    with tempfile.TemporaryDirectory() as folder:
        shard, rows = Path(folder) / "shard.bin", 64
        write_shard(shard, iter([made_up_tokens(rows * ROW + 1)]), Encoding(GPT2_VOCABULARY, GPT2_SEPARATOR, None))
        stream = TokenStream(str(shard))
        seconds = best_of(5, lambda: [read_rows(stream, row * ROW, 1, ROW, rows * ROW) for row in range(rows)])
    print(f"loader: {rows * ROW / seconds / 1e6:.0f} million tokens/s from the page cache on one core")


if __name__ == "__main__":
    main()
