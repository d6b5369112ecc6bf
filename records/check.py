"""Does this machine compute our numbers? 20 steps of two small float32 runs on the CPU, compared with stored losses.

    python records/check.py              # as ./run.sh check; exit status 0 inside the band, 1 outside
    python records/check.py --store      # write the losses of this machine to records/check.json instead

The runs are fixed: text made from a seeded generator, every size spelled out here, eager. One is the five-minute
recipe, the other the hundred-second one with all that it has, through its three stages and the extension. What may
differ from machine to machine is the order of additions; the band is wide enough for that and far too narrow for a
changed formula.
"""

import argparse
import contextlib
import glob
import io
import json
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "data")]
from text import BYTES, Parser, write_shard  # noqa: E402

from train_gpt2 import Config, Processes, preset_values, train  # noqa: E402

STORED, BAND = HERE / "check.json", 0.005  # nats; another order of additions moves a loss by about 0.0001
SAME = {"steps": 20, "val_every": 10, "micro_tokens": 1024, "loss_chunk": 700, "seed": 0,
        "device": "cpu", "dtype": "float32", "compile": "none"}
FIXED = {
    "five-minute": Config(**{
        **preset_values("five-minute"), **SAME, "tokens_per_step": (2048,), "row_tokens": (256,),
        "val_row_tokens": 256, "layers": 4, "heads": 2, "width": 128, "window": (127,)}),
    "gpt2": Config(**{
        **preset_values("gpt2"), **SAME, "extension": 0.1, "momentum_warmup": 300 / 1600,
        "momentum_cooldown": 50 / 1600, "tokens_per_step": (1024, 2048, 3072),
        "row_tokens": (128, 256, 384), "val_row_tokens": 512, "layers": 11, "heads": 2, "width": 64,
        "window": (48, 64, 96, 128), "window_short": (16, 32, 48, 64), "window_final": 192,
        "long_documents": "continue", "document_tokens": (100, 200), "muon_lr": 0.05,
        "adam_head": (0.03, 0.5, 0.95, 0.75),
        "adam_embedding": (0.03, 0.5, 0.95, 0.75), "adam_gates": (0.1, 0.9, 0.99, 0.005),
        "adam_residual": (0.04, 0.9, 0.95, 0.0), "adam_mixing": (0.03, 0.9, 0.95, 0.0),
        "adam_scalars": (0.1, 0.9, 0.99, 0.0)}),  # fast: 20 steps use every part
}


def fixed_text(characters: int) -> str:
    """Sentences of made-up words, some far more frequent than others. random.Random.random() is the same everywhere."""
    draw = random.Random(20240520).random
    words = ["".join("ptkslmnrd"[int(9 * draw())] + "aeiou"[int(5 * draw())] for _ in range(1 + int(3 * draw())))
             for _ in range(300)]
    text, length = [], 0
    while length < characters:
        text.append(words[int(300 * draw() ** 3)] + ("." if draw() < 0.1 else ""))
        length += len(text[-1]) + 1
    return " ".join(text)


def write_text(folder: Path) -> None:
    """The text as one document of some 50,000 bytes to train on, and one of 10,000 to validate on; and a table of
    prefixes, made up, as single bytes have none: every second letter follows the one before it."""
    text = fixed_text(60_000)
    for name, part in (("train", text[:50_000]), ("val", text[50_000:])):
        tokens = np.concatenate([[BYTES.separator], BYTES.encode(part)]).astype("<u2")
        write_shard(folder / f"{name}.bin", iter([tokens]), BYTES)
    token = np.arange(BYTES.vocabulary)
    np.where(token % 2, token - 1, -1).astype("<i4").tofile(folder / "prefixes.bin")


def measure(config: Config) -> list[float]:
    """The training losses of the 20 steps on the fixed text, then the validation losses of steps 0, 10 and 20."""
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder))
        names = glob.escape(folder)
        here = replace(config, train_files=f"{names}/train.bin", val_files=f"{names}/val.bin", out=folder)
        run = train(here, Processes(0, 1, torch.device("cpu")))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[kind] for kind in ("train_loss", "val_loss") for line in lines if kind in line]


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="write the losses of this machine instead")
    store = parser.parse_args().store
    with contextlib.redirect_stdout(io.StringIO()):  # what the runs say
        losses = {name: measure(config) for name, config in FIXED.items()}
    if store:
        rounded = {name: [round(loss, 6) for loss in values] for name, values in losses.items()}
        STORED.write_text(json.dumps({"torch": torch.__version__, "losses": rounded}) + "\n")
        print(f"stored the losses of {', '.join(losses)} in {STORED.name}")
        return
    stored, off = json.loads(STORED.read_text())["losses"], {}
    for name, values in losses.items():
        off[name] = max(abs(mine - theirs) for mine, theirs in zip(values, stored[name], strict=True))
        print(f"{name}: largest difference from the stored losses {off[name]:.6f} nats, band {BAND}")
    if not all(difference <= BAND for difference in off.values()):
        raise SystemExit("this machine does NOT compute our numbers: compare torch's version with requirements.txt "
                         "and look at the first step that differs")
    print("ok: this machine computes our numbers")


if __name__ == "__main__":
    main()
