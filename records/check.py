"""Does this machine compute our numbers? 20 steps of a small float32 run on the CPU, compared with stored losses.

    python records/check.py              # as ./run.sh check; exit status 0 inside the band, 1 outside
    python records/check.py --store      # write the losses of this machine to records/check.json instead

The run is fixed: text made from a seeded generator, every size spelled out here, eager. What may differ from machine
to machine is the order of additions; the band is wide enough for that and far too narrow for a changed formula.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "data")]
from text import BYTES, write_shard  # noqa: E402
from train_gpt2 import PRESETS, Config, Processes, train  # noqa: E402

STORED, BAND = HERE / "check.json", 0.01  # nats; machines tried so far differ by less than a tenth of it
FIXED = Config(**{
    **PRESETS["five-minute"], "preset": "five-minute", "steps": 20, "tokens_per_step": (2048,), "row_tokens": (256,),
    "val_row_tokens": 256, "micro_tokens": 1024, "val_every": 10, "layers": 4, "heads": 2, "width": 128,
    "window": (127,), "loss_chunk": 700, "seed": 0, "device": "cpu", "dtype": "float32", "compile": "none"})


def fixed_text(characters: int) -> str:
    """Sentences of made-up words, some far more frequent than others. random.Random.random() is the same everywhere."""
    draw = random.Random(20240520).random
    words = ["".join("ptkslmnrd"[int(9 * draw())] + "aeiou"[int(5 * draw())] for _ in range(1 + int(3 * draw())))
             for _ in range(300)]
    text = []
    while sum(map(len, text)) + len(text) < characters:
        text.append(words[int(300 * draw() ** 3)] + ("." if draw() < 0.1 else ""))
    return " ".join(text)


def measure() -> list[float]:
    """The training losses of the 20 steps, then the validation losses of steps 0, 10 and 20."""
    with tempfile.TemporaryDirectory() as folder:
        text = fixed_text(60_000)
        for name, part in (("train", text[:50_000]), ("val", text[50_000:])):
            tokens = np.concatenate([[BYTES.separator], BYTES.encode(part)]).astype("<u2")
            write_shard(Path(folder) / f"{name}.bin", iter([tokens]), BYTES)
        config = dict(vars(FIXED), train_files=f"{folder}/train.bin", val_files=f"{folder}/val.bin", out=folder)
        run = train(Config(**config), Processes(0, 1, torch.device("cpu")))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[kind] for kind in ("train_loss", "val_loss") for line in lines if kind in line]


def main() -> None:
    losses = measure()
    if sys.argv[1:] == ["--store"]:
        rounded = [round(loss, 6) for loss in losses]
        STORED.write_text(json.dumps({"torch": torch.__version__, "losses": rounded}) + "\n")
        print(f"stored {len(losses)} losses in {STORED.name}")
        return
    stored = json.loads(STORED.read_text())["losses"]
    off = max(abs(mine - theirs) for mine, theirs in zip(losses, stored, strict=True))
    print(f"largest difference from the stored losses: {off:.6f} nats, band {BAND}")
    if not off <= BAND:
        raise SystemExit("this machine does NOT compute our numbers: compare torch's version with requirements.txt "
                         "and look at the first step that differs")
    print("ok: this machine computes our numbers")


if __name__ == "__main__":
    main()
