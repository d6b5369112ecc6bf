"""Time per step and memory of any configuration, on made-up tokens: what a full run would take on this machine.

    python records/timing.py --preset five-minute --tokens-per-step 16384 --row-tokens 1024   # a CPU
    torchrun --standalone --nproc_per_node=8 records/timing.py                                # the five-minute run

Options are those of train_gpt2.py; --steps is the number of steps timed (default 5, after one more that is not).
"""

import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "data")]
from text import Encoding, write_shard  # noqa: E402
from train_gpt2 import (GPT2_SEPARATOR, GPT2_VOCABULARY, compute_dtype, parse_command_line,  # noqa: E402
                        start_processes, train, utilisation)

TYPICAL_DOCUMENT = 765  # tokens, the median of web text


def made_up_tokens(count: int) -> np.ndarray:
    """(count,) uint16 GPT-2 tokens, uniform, with documents of a typical length."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, GPT2_SEPARATOR, count, dtype=np.uint16)
    tokens[np.cumsum(draw.geometric(1 / TYPICAL_DOCUMENT, count // TYPICAL_DOCUMENT)) % count] = GPT2_SEPARATOR
    return tokens


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse_command_line(arguments)
    full_steps = parse_command_line([]).steps if config.preset == "five-minute" else config.steps
    timed = config.steps if any(word.startswith("--steps") for word in arguments) else 5
    processes = start_processes(config)
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "shard.bin"
        write_shard(shard, iter([made_up_tokens(4 * config.tokens_per_step + 1)]),
                    Encoding(GPT2_VOCABULARY, GPT2_SEPARATOR, None))
        short = replace(config, train_files=str(shard), val_files=str(shard), repeat=True, steps=timed + 1, val_every=0,
                        val_tokens=config.row_tokens, out=folder)
        run = train(short, processes)
        if run is None:
            return
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The first step's loss is read while the second one runs, so the steps between two readings are what was timed.
    times = [line["train_time_s"] for line in lines if "train_loss" in line]
    seconds = statistics.median(later - earlier for earlier, later in zip(times, times[1:], strict=False))
    speed = config.tokens_per_step / seconds
    used = utilisation(config, GPT2_VOCABULARY, speed, processes, compute_dtype(config, processes.device))
    print(f"\n{'processes':>9} {'ms/step':>10} {'tokens/s':>12} {'FLOP use':>9} {'peak MiB':>9} {'full run':>12}")
    print(f"{processes.world:9} {1000 * seconds:10.1f} {speed:12,.0f} {used:>9} {lines[-1]['peak_memory_mib']:9,.0f} "
          f"{full_steps * seconds:10,.1f} s  ({os.cpu_count()} cores, {processes.device.type})")


if __name__ == "__main__":
    main()
