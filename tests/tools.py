"""What several test files need: shards, small configurations and models, runs of the script."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import train_gpt2
from train_gpt2 import Batch, Config, Processes

ROOT = Path(__file__).resolve().parent.parent
ALONE = Processes(0, 1, torch.device("cpu"))

# Command lines of models that train in tens of milliseconds per step, through the same code as the large
# ones: record 12 in three layers, and gpt2 in all its eleven, three stages and the extension.
SMALL = dict(
    preset="five-minute", layers=3, width=64, heads=2, row_tokens=128, tokens_per_step=1024, window=95,
    steps=8, val_every=4, val_tokens=2000, val_row_tokens=128, device="cpu", dtype="float32", compile="none")
RECIPE = dict(
    preset="gpt2", width=32, heads=2, row_tokens="128,256,384", tokens_per_step="1024,2048,3072", steps=12,
    extension=0.25, window="64,96,128,160", window_short="16,32,48,64", window_final=200, val_every=6,
    document_tokens="60,90", bigram_width=24, bigram_signs=200, val_tokens=2000, val_row_tokens=512, device="cpu",
    dtype="float32", compile="none")


def random_documents(count: int, vocabulary: int = 257, separator: int = 256, seed: int = 0,
                     length: int = 60) -> np.ndarray:
    """(count,) uint16: documents of `length` tokens on average. Few ids are frequent, and most tokens
    repeat one of the last few, so that there is something to learn."""
    draw = np.random.default_rng(seed)
    tokens = (draw.geometric(0.1, count) - 1) % (vocabulary - 1)
    tokens += tokens >= separator
    back = draw.integers(1, 4, count)
    for i in np.flatnonzero(draw.random(count) < 0.6):
        tokens[i] = tokens[max(0, i - back[i])]
    tokens[draw.random(count) < 1 / length] = separator
    tokens[0] = separator
    return tokens.astype(np.uint16)


def write_shard(path, tokens, vocabulary: int = 0, separator: int = 0, **overrides) -> Path:
    """A shard. overrides: what its header says instead of the truth, as magic, version or count."""
    header = {"magic": 20240520, "version": 1, "count": len(tokens), "vocabulary": vocabulary,
              "separator": separator, **overrides}
    words = np.zeros(256, "<i4")
    words[:5] = list(header.values())
    Path(path).write_bytes(words.tobytes() + np.asarray(tokens).astype("<u2").tobytes())
    return Path(path)


def made_up_prefixes(vocabulary: int) -> np.ndarray:
    """(vocabulary,) int32: of about half of the tokens a smaller one, of the others -1."""
    draw = np.random.default_rng(7)
    return np.where(draw.random(vocabulary) < 0.5, draw.integers(0, np.arange(vocabulary) + 1) - 1, -1).astype("<i4")


def write_corpus(folder: Path, train=(9000, 4000, 8000), val=(1500, 1200), vocabulary: int = 257,
                 separator: int = 256) -> Path:
    """Shards text_train_*.bin and text_val_*.bin of these many tokens each, and prefixes. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made_up_prefixes(vocabulary).tofile(folder / train_gpt2.PREFIXES)
    for seed, (part, counts) in enumerate((("train", train), ("val", val))):
        tokens = random_documents(sum(counts), vocabulary, separator, seed)
        for number, piece in enumerate(np.split(tokens, np.cumsum(counts)[:-1])):
            write_shard(folder / f"text_{part}_{number:06}.bin", piece, vocabulary, separator)
    return folder


def command(folder: Path, base: dict = SMALL, **changes) -> list[str]:
    """The command line of SMALL or RECIPE with changes, on the shards of `folder`; runs go to its logs."""
    settings = {"train_files": folder / "text_train_*.bin", "val_files": folder / "text_val_*.bin",
                "out": folder / "logs", **base, **changes}
    return [f"{train_gpt2.flag(name)}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in settings.items()]


def configuration(folder: Path, base: dict = SMALL, **changes) -> Config:
    return train_gpt2.parse_command_line(command(folder, base, **changes))


def run_folders(out: Path) -> set[Path]:
    """The folders of the runs below `out`; none where it does not exist."""
    return set(out.iterdir()) if out.is_dir() else set()


def run_here(folder: Path, base: dict = SMALL, **changes) -> Path:
    """Train in this process. Returns the run's folder: the one whose log has grown."""
    out = Path(changes.get("out", folder / "logs"))

    def sizes() -> set[tuple]:
        return {(run, (run / "log.txt").stat().st_size) for run in run_folders(out)}

    before = sizes()
    train_gpt2.main(command(folder, base, **changes))
    (run, _), = sizes() - before
    return run


def runs_by_settings(folder: Path, out: Path):
    """A function: the run of one process with these settings, made when it is first asked for."""
    runs = {}

    def run(settings: dict) -> Path:
        key = json.dumps(settings)
        if key not in runs:
            runs[key] = run_here(folder, base=settings, out=out / str(len(runs)))
        return runs[key]
    return run


def metrics(run: Path) -> list[dict]:
    """The records that count: one of step s takes back those of later steps before it, and its like."""
    counted = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        new = json.loads(line)
        counted = [old for old in counted if old["step"] < new["step"]
                   or old["step"] == new["step"] and old.keys() != new.keys()]
        counted.append(new)
    return counted


def losses(run: Path, kind: str = "train_loss") -> list[float]:
    """The losses of one kind, in order."""
    return [record[kind] for record in metrics(run) if kind in record]


def weights(run: Path) -> dict:
    return train_gpt2.load_model(run / "model.pt")[1]["weights"]


def start(arguments: list, **options) -> subprocess.CompletedProcess:
    """Run python with these arguments on one thread. After `timeout` seconds it and its children end."""
    timeout = options.pop("timeout", 120)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"still running after {timeout} s:\n{stdout}\n{stderr}") from None
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def torchrun(processes: int, script: Path, *arguments, **options) -> subprocess.CompletedProcess:
    """Run a script in several processes on this machine, as `torchrun --standalone` does."""
    return start(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script,
                  *arguments], **options)


def random_starts(rows: int, tokens: int, draw: np.random.Generator) -> torch.Tensor:
    """(rows, tokens) bool, where documents start: none, few, many or all; some on borders of blocks."""
    starts = draw.random((rows, tokens)) < draw.choice([0, 0.003, 0.01, 0.05, 0.3, 1], (rows, 1))
    if draw.random() < 0.4:
        starts[:, ::128] |= draw.random(starts[:, ::128].shape) < 0.5
    return torch.from_numpy(starts)


def dense_mask(starts: torch.Tensor, window: int) -> torch.Tensor:
    """(R, T) -> (R, T, T) bool, [row, query, key]: not later, same document, at most `window` before."""
    position, document = torch.arange(starts.shape[1]), starts.long().cumsum(1)
    query, key = position[:, None], position[None, :]
    return (key <= query) & (document[:, :, None] == document[:, None, :]) & (query - key <= window)


# Sizes of small models. Their rows and windows are shorter than a command line allows.
SIZES = {
    "five-minute": dict(layers=4, heads=2, width=16, row_tokens=(64,), val_row_tokens=64, window=(23,)),
    "gpt2": dict(heads=4, width=32, row_tokens=(64, 128), val_row_tokens=128, window=(24, 40, 60, 90),
                 window_short=(8, 16, 24, 32), window_final=120, bigram_width=20, bigram_signs=37)}


def small_config(preset: str = "five-minute", **changes) -> Config:
    values = train_gpt2.preset_values(preset) | SIZES.get(preset, SIZES["gpt2"])
    return Config(**values | dict(dtype="float64", loss_chunk=50, tokens_per_step=values["row_tokens"]) | changes)


def small_model(vocabulary: int = 50, dtype: str = "float64", spread: float = 0.0, preset: str = "five-minute",
                float8: bool = False, compiled: bool = False, **changes) -> train_gpt2.GPT:
    """A GPT of small_config. spread > 0: every parameter is drawn anew with about this spread around its
    first value, so that none is zero and the output of no part vanishes."""
    config, draw = small_config(preset, dtype=dtype, **changes), torch.Generator().manual_seed(1)
    model = train_gpt2.GPT(config, vocabulary, made_up_prefixes(vocabulary), float8, compiled)
    for p in model.parameters() if spread else ():
        p.data += (spread * torch.randn(p.shape, generator=draw, dtype=torch.float64)).to(p.dtype)
    return model


def random_batch(rows: int, tokens: int, vocabulary: int = 50, seed: int = 0) -> Batch:
    """Random tokens and documents; a tenth of the targets is missing."""
    draw = np.random.default_rng(seed)
    text = draw.integers(0, vocabulary, (rows, tokens + 1))
    targets = np.where(draw.random((rows, tokens)) < 0.1, -1, text[:, 1:])
    starts = draw.random((rows, tokens)) < 0.05
    return Batch(torch.from_numpy(text[:, :-1].astype(np.int32)), torch.from_numpy(targets),
                 torch.from_numpy(starts))
