"""Train a GPT-2-class model to 3.28 validation loss on FineWeb: in five minutes on 8 H100s, unchanged on a laptop.

    torchrun --standalone --nproc_per_node=8 train_gpt2.py     # the five-minute recipe: 124M, Muon, FlexAttention
    python train_gpt2.py --preset tiny                         # a small model through the same code, on a CPU
    python train_gpt2.py --help                                # every setting, with its default and unit

The file reads from top to bottom in the order the data flows:

    configuration -> processes -> shards to rows -> rows to attention mask -> model -> loss -> optimizers
    -> schedules -> validation -> log and checkpoint -> training loop

Importing it does nothing. State lives in three places only: a frozen Config, the model's parameters, and the groups of
the optimizers. Sizes are in tokens unless a name says otherwise. Shapes: R rows, T tokens per row, D width,
H heads, K = D / H, V vocabulary.
"""

import ctypes
import dataclasses
import difflib
import functools
import glob
import importlib.util
import json
import math
import os
import platform
import secrets
import shutil
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Configuration. In: the command line. Out: one frozen Config, checked, that every later section reads and none changes.


class Refusal(SystemExit):
    """Bad input. Carries one line: what was found, what was expected, the command that mends it. Exit status 1."""


def setting(default, unit: str, reason: str, low: float = 0, high: float = math.inf):
    return field(default=default, metadata={"unit": unit, "reason": reason, "low": low, "high": high})


@dataclass(frozen=True)
class Config:
    """One run. The defaults are the five-minute recipe; `PRESETS` holds what the others change."""

    preset: str = setting("five-minute", "name", "which set of defaults the other options start from")
    # what to train on
    train_files: str = setting("data/fineweb10B/fineweb_train_*.bin", "glob", "training shards, read in name order")
    val_files: str = setting("data/fineweb10B/fineweb_val_*.bin", "glob", "validation shards")
    repeat: bool = setting(False, "true|false", "start over when the training shards are used up")
    shuffle: bool = setting(False, "true|false", "take rows from all over the shards, each once, not in their order")
    # how much at a time
    steps: int = setting(1875, "updates", "length of the run; schedules stretch with it", 1)
    tokens_per_step: int = setting(524_288, "tokens", "batch of one update, over all processes", 1)
    row_tokens: int = setting(65_536, "tokens", "packed sequence that attention sees at once", 1)
    micro_tokens: int = setting(0, "tokens", "whole rows per forward pass; 0: up to 65,536 tokens (on a CPU 1,024)")
    recompute: bool = setting(False, "true|false", "recompute block activations in backward, for small memories")
    loss_chunk: int = setting(8192, "tokens", "logits held at once by the loss", 1)
    # how it is judged
    val_every: int = setting(125, "updates", "distance between validations; 0: only the first and the last")
    val_tokens: int = setting(10_485_760, "tokens", "validation tokens, always the first ones of the shards", 1)
    # the model
    layers: int = setting(12, "count", "transformer blocks", 1)
    heads: int = setting(6, "count", "attention heads", 1)
    width: int = setting(768, "channels", "residual stream", 2)
    mlp_ratio: int = setting(4, "times width", "hidden channels of the MLP", 1)
    window: int = setting(1024, "tokens", "how many keys a query sees, itself included", 1)
    window_start: int = setting(1024, "tokens", "window at step 0, growing by 64s; equal to window: constant", 1)
    rotary_base: float = setting(10_000.0, "-", "slowest rotary wavelength / 2 pi", 1)
    rms_epsilon: float = setting(2.0**-7, "-", "added to the mean square; 2^-7 is bf16's epsilon, as in record 12")
    qk_norm: bool = setting(True, "true|false", "normalise queries and keys per head: attention logits stay bounded")
    softcap: float = setting(30.0, "logits", "squash logits to +-softcap, against over-confidence; 0: off")
    x0_shortcut: bool = setting(True, "true|false", "each block mixes the embedding back into the stream")
    value_residual: bool = setting(True, "true|false", "each layer mixes layer 0's values into its own")
    unet_skips: bool = setting(True, "true|false", "feed the first half's outputs to the second half, mirrored")
    # the optimizers
    muon_lr: float = setting(0.04, "-", "block matrices: step length in units of an orthogonal matrix")
    muon_momentum: float = setting(0.95, "-", "momentum of Muon after its warm-up", 0, 0.9999)
    muon_momentum_start: float = setting(0.85, "-", "momentum at step 0; equal to muon_momentum: no warm-up", 0, 0.9999)
    momentum_warmup: float = setting(500 / 1875, "of steps", "length of the momentum warm-up", 0, 1)
    newton_schulz_steps: int = setting(5, "count", "iterations that orthogonalise an update; 0: only scale it")
    embed_lr: float = setting(0.6, "-", "Adam, token embedding")
    head_lr: float = setting(0.008, "-", "Adam, output head")
    scalar_lr: float = setting(0.04, "-", "Adam, mixing weights of shortcuts and skips")
    adam_beta1: float = setting(0.9, "-", "Adam, decay of the mean", 0, 0.9999)
    adam_beta2: float = setting(0.95, "-", "Adam, decay of the squares", 0, 0.9999)
    adam_epsilon: float = setting(1e-8, "-", "Adam, added to the root of the bias-corrected squares")
    cooldown: float = setting(562 / 1875, "of steps", "last part of the run, rates linear to zero; 0: none", 0, 1)
    # the machine
    seed: int = setting(0, "-", "seed of the initial weights and of the shuffle", 0, 2**63 - 1)
    device: str = setting("auto", "auto|cpu|cuda", "auto: the GPU if there is one")
    dtype: str = setting("auto", "auto|bfloat16|float32|float64", "auto: bfloat16 where the hardware is made for it")
    compile: str = setting("auto", "auto|none", "auto: torch.compile with FlexAttention on a GPU, eager on a CPU")
    out: str = setting("logs", "folder", "where the run's own folder is made")


PRESETS = {
    "five-minute": {},
    "tiny": {
        "train_files": "data/text/text_train_*.bin", "val_files": "data/text/text_val_*.bin",
        "shuffle": True, "steps": 640, "tokens_per_step": 1024, "row_tokens": 128, "val_every": 40,
        "val_tokens": 131_072, "layers": 3, "heads": 2, "width": 128, "window": 128, "window_start": 128,
        "muon_momentum": 0.8, "muon_momentum_start": 0.8, "adam_beta1": 0.65, "cooldown": 0.8,
    },
}


def parse_command_line(arguments: list[str]) -> Config:
    """`--any-field VALUE`, `--any_field=VALUE` on top of a preset. Raises Refusal, naming the nearest valid option."""
    options, given, words = {f.name: f for f in fields(Config)}, {}, list(arguments)
    wants_help = bool({"-h", "--help"} & set(words))
    words = [word for word in words if word not in ("-h", "--help")]
    while words:
        flag, equals, value = words.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in options:
            raise Refusal(f"unknown option {flag}; the nearest is --{nearest(name, options).replace('_', '-')} "
                          "(python train_gpt2.py --help lists all)")
        if name in given:
            raise Refusal(f"{flag} is given twice; give it once")
        if not equals and not words:
            raise Refusal(f"{flag} needs a value; for example {flag} {spelled(options[name].default)}")
        given[name] = parse_value(flag, value if equals else words.pop(0), options[name])
    preset = given.get("preset", Config.preset)
    if wants_help:
        print_help(preset)
        raise SystemExit(0)
    base = Config(**{**PRESETS[preset], "preset": preset})
    if "window" in given and base.window_start == base.window:  # constant stays constant
        given.setdefault("window_start", given["window"])
    config = dataclasses.replace(base, **given)
    check_config(config)
    return config


def spelled(value) -> str:
    """A setting's value as it is typed."""
    return f"{value:.6g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def nearest(word: str, words) -> str:
    return difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.0)[0]


def parse_value(flag: str, text: str, option: dataclasses.Field):
    """The text as the option's type, within its range or among its words (`auto|none`). Raises Refusal."""
    words = list(PRESETS) if option.name == "preset" else option.metadata["unit"].split("|")
    if option.name == "preset" or len(words) > 1:
        if text not in words:
            raise Refusal(f"{flag} {text} is not one of {', '.join(words)}; "
                          f"the nearest is {flag} {nearest(text, words)}")
        return text == "true" if option.type is bool else text
    low, high = option.metadata["low"], option.metadata["high"]
    try:
        value = option.type(text)
        valid = option.type is str or (low <= value <= high and math.isfinite(value))
    except (ValueError, OverflowError):
        valid = False
    if not valid:
        kind = {int: "a whole number", float: "a number"}[option.type]
        bounds = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
        raise Refusal(f"{flag} {text} is not {kind} {bounds}; for example {flag} {option.default}")
    return value


def check_config(config: Config) -> None:
    """Raises Refusal for combinations that cannot work, each with the nearest value that does."""
    def must_divide(name: str, unit: int, what: str) -> None:
        value, flag = getattr(config, name), "--" + name.replace("_", "-")
        if value % unit:
            raise Refusal(f"{flag} {value} is not a whole number of {what} ({unit}); "
                          f"the nearest is {flag} {max(1, round(value / unit)) * unit}")

    must_divide("row_tokens", MASK_BLOCK, "mask blocks")
    must_divide("tokens_per_step", config.row_tokens, "rows")
    must_divide("micro_tokens", config.row_tokens, "rows")
    must_divide("width", 2 * config.heads, f"pairs of channels for each of --heads {config.heads}")
    if config.window_start > config.window:
        raise Refusal(f"--window-start {config.window_start} exceeds --window {config.window}; "
                      f"the nearest is --window-start {config.window}")


def rows_per_micro(config: Config, world: int, device: torch.device) -> int:
    """Rows in one forward pass of one process. Accumulation follows from it: (rows of a step / world) / this.

    Raises Refusal, with the nearest valid number, where the rows of a step do not divide.
    """
    rows = config.tokens_per_step // config.row_tokens
    if rows % world:
        near = max(n for n in range(1, world + 1) if rows % n == 0)
        raise Refusal(f"{world} processes cannot share {rows} rows per step; the nearest is --nproc_per_node={near}, "
                      f"or --tokens-per-step {math.ceil(rows / world) * world * config.row_tokens}")
    share = rows // world
    wanted = config.micro_tokens // config.row_tokens
    if not wanted:
        most = max(1, (65_536 if device.type == "cuda" else 1024) // config.row_tokens)
        return max(n for n in range(1, share + 1) if share % n == 0 and n <= most)
    if share % wanted:
        near = max(n for n in range(1, share + 1) if share % n == 0 and n <= wanted)
        raise Refusal(f"--micro-tokens {config.micro_tokens} is {wanted} rows, which do not divide the {share} rows of "
                      f"a step in each of {world} processes; the nearest is --micro-tokens {near * config.row_tokens}")
    return wanted


def print_help(preset: str) -> None:
    values = Config(**{**PRESETS[preset], "preset": preset})
    print(__doc__.split("\n\nThe file")[0])
    print(f"\nSettings, with the defaults of --preset {preset} (presets: {', '.join(PRESETS)}):\n")
    for f in fields(Config):
        value = spelled(getattr(values, f.name))
        print(f"  --{f.name.replace('_', '-'):22} {value:>8} [{f.metadata['unit']}]  {f.metadata['reason']}")


# ----------------------------------------------------------------------------------------------------------------------
# Processes. In: what torchrun put into the environment. Out: this process's rank, the number of processes, its device.


class Processes(NamedTuple):
    """rank of this process (0 writes the log), number of processes, and the device this one computes on."""

    rank: int
    world: int
    device: torch.device

    def synchronize(self) -> None:
        """Wait until the device has done all it was given, so that the host's clock means something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def event(self) -> torch.cuda.Event | None:
        """A mark behind what the device has been given so far; None on a CPU, which has done it already."""
        return torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None


def start_processes(config: Config) -> Processes:
    """Join the process group where torchrun started several. Raises Refusal for a GPU that cannot be used."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cpu")
    if config.device == "cuda" or (config.device == "auto" and (torch.cuda.is_available() or driver_gpus())):
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # an old driver, a hidden GPU, a torch built without CUDA
            raise Refusal(f"torch {torch.__version__} cannot use a GPU (the driver shows {driver_gpus() or 'none'}): "
                          f"{' '.join(str(error).split())}; mend that, or give --device cpu") from None
        if local >= torch.cuda.device_count():
            raise Refusal(f"process {local} of this machine has no GPU: torch sees {torch.cuda.device_count()}; "
                          f"start with --nproc_per_node={torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    if world > 1 and "MASTER_ADDR" not in os.environ:
        raise Refusal(f"WORLD_SIZE is {world}, but MASTER_ADDR is not set; let torchrun start the processes: "
                      f"torchrun --standalone --nproc_per_node={world} train_gpt2.py")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                device_id=device if device.type == "cuda" else None)
    return Processes(rank, world, device)


def keep_freed_memory() -> None:
    """Have the C library keep what large tensors free, instead of returning it to the system and faulting every page
    in again at the next step, which costs `tiny` a tenth of its time. Without glibc, nothing happens."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    trim_threshold, most_mappings = -1, -4
    mallopt(most_mappings, 0)
    mallopt(trim_threshold, 2**31 - 1)


def driver_gpus() -> str:
    """What the NVIDIA driver itself lists, whether or not torch can use it; empty where there is none."""
    listed = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    lines = listed.stdout.splitlines() if listed and listed.returncode == 0 else []
    return ", ".join(line.split("(")[0].strip() for line in lines if line.startswith("GPU"))


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of activations, embedding and Newton-Schulz. All other weights are stored in at least float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    on_gpu = device.type == "cuda"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Shards to rows. In: files of uint16 tokens. Out: batches of rows on the device. The shards form one stream, and which
# tokens form which row depends on the stream and the step alone, never on the number of processes.

SHARD_MAGIC, SHARD_VERSION, HEADER_WORDS = 20240520, 1, 256
GPT2_VOCABULARY, GPT2_SEPARATOR = 50257, 50256


class Shard(NamedTuple):
    """A checked file: 256 little-endian int32 header words (magic, version, token count, vocabulary size, separator;
    0 in the last two means GPT-2), then uint16 tokens."""

    path: str
    tokens: int
    vocabulary: int
    separator: int


def write_again(path: str | Path) -> str:
    """What mends a damaged shard."""
    return f"fetch or write it again: rm {path} && {shard_command(path)}"


def open_shard(path: str | Path) -> Shard:
    """Check the header against the file. Raises Refusal naming the file and what is wrong with it."""
    mend = write_again(path)
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, "<i4", HEADER_WORDS)
    except OSError as error:
        raise Refusal(f"cannot read shard {path}: {error.strerror}; {mend}") from None
    if len(header) < HEADER_WORDS:
        raise Refusal(f"{path} has {size} bytes, less than a shard's header of {4 * HEADER_WORDS}; {mend}")
    magic, version, count, vocabulary, separator = (int(word) for word in header[:5])
    if magic != SHARD_MAGIC:
        mend = mend if str(path).endswith(".bin") else f"make shards of text: python data/text.py {path} --out FOLDER"
        raise Refusal(f"{path} is no token shard: its first word is {magic}, expected {SHARD_MAGIC}; {mend}")
    if version != SHARD_VERSION:
        raise Refusal(f"{path} has shard version {version}, expected {SHARD_VERSION}; {mend}")
    if count <= 0 or size != 4 * HEADER_WORDS + 2 * count:
        raise Refusal(f"{path} promises {count} tokens but holds {(size - 4 * HEADER_WORDS) // 2}: "
                      f"{'truncated' if size < 4 * HEADER_WORDS + 2 * count else 'damaged'}; {mend}")
    vocabulary = vocabulary or GPT2_VOCABULARY
    separator = separator or (GPT2_SEPARATOR if vocabulary > GPT2_SEPARATOR else 0)
    if not 0 < vocabulary <= 65_536 or not 0 <= separator < vocabulary:
        raise Refusal(f"{path} states a vocabulary of {vocabulary} with separator {separator}, expected at most 65536 "
                      f"and a separator within it; {mend}")
    return Shard(str(path), count, vocabulary, separator)


def shard_command(pattern: str | Path, shards: int = 10) -> str:
    """The command that makes the shards of a glob."""
    if "fineweb" in str(pattern):
        return f"python data/fineweb.py {shards}"
    folder = Path(pattern).parent
    return "python data/text.py" + f" TEXT... --out {folder}" * (folder != Path("data/text"))


def read_tokens(shard: Shard, start: int, count: int) -> np.ndarray:
    """(count,) uint16 tokens from `start` on. Raises Refusal if the file has changed or holds an impossible token."""
    try:
        tokens = np.fromfile(shard.path, "<u2", count, offset=4 * HEADER_WORDS + 2 * start)
    except OSError as error:
        raise Refusal(f"shard {shard.path} can no longer be read: {error.strerror}; "
                      f"{write_again(shard.path)}") from None
    if len(tokens) < count:
        raise Refusal(f"shard {shard.path} ends at token {start + len(tokens)} of {shard.tokens}: it was cut after the "
                      f"start; {write_again(shard.path)}")
    if count and int(tokens.max()) >= shard.vocabulary:
        at = start + int(tokens.argmax())
        raise Refusal(f"shard {shard.path} holds token {tokens.max()} at position {at}, beyond its vocabulary of "
                      f"{shard.vocabulary}; {write_again(shard.path)}")
    return tokens


class TokenStream:
    """The shards of a glob in name order as one sequence of `tokens` tokens; a read beyond its end starts over."""

    def __init__(self, pattern: str):
        """Raises Refusal for a glob without files and for shards that disagree on their vocabulary."""
        if os.path.isdir(pattern):
            raise Refusal(f"{pattern} is a folder; expected a glob of shards: '{pattern}/*_train_*.bin'")
        paths = sorted(glob.glob(pattern))
        if not paths:
            raise Refusal(f"no shard matches {pattern}; expected token shards, made by {shard_command(pattern)}")
        self.shards = [open_shard(path) for path in paths]
        kinds = {(shard.vocabulary, shard.separator): shard.path for shard in self.shards}
        if len(kinds) > 1:
            raise Refusal(f"shards of {pattern} disagree on (vocabulary, separator): {kinds}; "
                          f"encode all of them the same way: {shard_command(pattern)}")
        (self.vocabulary, self.separator), = kinds
        self.first = np.cumsum([0] + [shard.tokens for shard in self.shards])  # stream position of each shard; the end
        self.tokens = int(self.first[-1])
        # A shard without separators is one document, so that one starts there and another one after it.
        chunk = 1 << 20
        whole = [not any((read_tokens(s, at, min(chunk, s.tokens - at)) == s.separator).any()
                         for at in range(0, s.tokens, chunk)) for s in self.shards]
        self.opens_document = [i == 0 or whole[i] or whole[i - 1] for i in range(len(whole))]

    def read(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(count,) uint16 tokens from a position of the stream on; (count,) bool, true where a document starts."""
        tokens, starts, filled = np.empty(count, np.uint16), np.empty(count, bool), 0
        while filled < count:
            at = (position + filled) % self.tokens
            index = int(np.searchsorted(self.first, at, side="right")) - 1
            shard, inside = self.shards[index], at - int(self.first[index])
            part = slice(filled, min(count, filled + shard.tokens - inside))
            tokens[part] = read_tokens(shard, inside, part.stop - part.start)
            np.equal(tokens[part], self.separator, out=starts[part])
            if inside == 0 and self.opens_document[index]:
                starts[filled] = True
            filled = part.stop
        return tokens, starts


class Batch(NamedTuple):
    """R rows of T tokens: inputs int32, targets int64 (the next token; -1: none), starts bool (a document begins)."""

    inputs: Tensor
    targets: Tensor
    starts: Tensor


def read_rows(stream: TokenStream, position: int, rows: int, row_tokens: int, end: int) -> Batch:
    """Consecutive rows from `position` on, in host memory. Inputs from `end` on have no target: a ragged last row."""
    count = max(0, min(rows * row_tokens, end - position))
    tokens, starts = stream.read(position, count + 1 if count else 0)
    inputs, targets = np.zeros(rows * row_tokens, np.int32), np.full(rows * row_tokens, -1, np.int64)
    begins = np.zeros(rows * row_tokens, bool)
    inputs[:count], targets[:count], begins[:count] = tokens[:count], tokens[1:], starts[:count]
    return Batch(*(torch.from_numpy(array).view(rows, row_tokens) for array in (inputs, targets, begins)))


@functools.lru_cache(maxsize=2)
def row_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """(rows,) every row number once, in an order that only these three numbers decide."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


def row_positions(config: Config, stream_tokens: int, step: int) -> list[int]:
    """Where each row of a step begins in the stream: the same for any number of processes.

    In order, rows follow each other without a gap and run on over the end. Shuffled, the whole rows of the stream are
    dealt out once, then once more in another order.
    """
    count, whole = config.tokens_per_step // config.row_tokens, (stream_tokens - 1) // config.row_tokens
    numbers = range(step * count, (step + 1) * count)
    if config.shuffle:
        numbers = [int(row_order(whole, config.seed, number // whole)[number % whole]) for number in numbers]
    return [number * config.row_tokens for number in numbers]


def step_batch(stream: TokenStream, config: Config, processes: Processes, step: int) -> Batch:
    """This process's rows of a step: consecutive ones, as many as every other process has. In host memory."""
    positions = row_positions(config, stream.tokens, step)
    share = len(positions) // processes.world
    rows = [read_rows(stream, position, 1, config.row_tokens, position + config.row_tokens)
            for position in positions[processes.rank * share:(processes.rank + 1) * share]]
    return Batch(*(torch.cat(parts) for parts in zip(*rows, strict=True)))


def prefetched(load, count: int, processes: Processes):
    """Yield load(0), ..., load(count - 1) on the device; the next one is read and copied while this one is in use."""
    copies = torch.cuda.Stream(processes.device) if processes.device.type == "cuda" else None

    def fetch(index: int) -> Batch:
        batch = load(index)
        if copies is None:
            return batch
        torch.cuda.set_device(processes.device)  # a new thread starts on GPU 0, whatever its process uses
        with torch.cuda.stream(copies):
            batch = Batch(*(part.pin_memory().to(processes.device, non_blocking=True) for part in batch))
        copies.synchronize()
        return batch

    with ThreadPoolExecutor(max_workers=1) as reader:
        upcoming = reader.submit(fetch, 0)
        for index in range(count):
            batch = upcoming.result()
            if index + 1 < count:
                upcoming = reader.submit(fetch, index + 1)
            if copies is not None:  # the memory must not be handed to a later copy while this step still reads it
                for part in batch:
                    part.record_stream(torch.cuda.current_stream(processes.device))
            yield batch


# ----------------------------------------------------------------------------------------------------------------------
# Rows to attention mask. In: where documents start, (R, T) bool, and the window. Out: what each query may see. Causal,
# same document, sliding window: the keys of query q are always one interval [first_key[q], q], and first_key never
# decreases along a row. So the mask is two comparisons, and its blocks are intervals too: no T x T work anywhere.

MASK_BLOCK = 128


def first_visible_key(starts: Tensor, window: int) -> Tensor:
    """(R, T) bool, tokens -> (R, T) int32: the first key each query sees, itself at the latest."""
    position = torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device)
    document = (position * starts).cummax(dim=1).values
    return torch.maximum(document, position - (min(window, len(position)) - 1))


def interval_rule(first_key: Tensor):
    """The mask itself, as FlexAttention wants it: (row, head, query, key) -> may the query see the key?"""
    def visible(row, head, query, key):
        return (first_key[row, query] <= key) & (key <= query)
    return visible


def block_mask(first_key: Tensor) -> BlockMask:
    """(R, T) int32 -> BlockMask of T / 128 squared blocks, all on the device without waiting for it.

    Query block i visits key blocks [reach[i], i]: those in [inside[i], i) lie wholly within the mask, the diagonal and
    those left of inside[i] are tested token by token. As reach and inside never decrease, the query blocks of a key
    block, which the backward pass visits, are intervals as well and their ends are found by bisection.
    """
    rows, tokens = first_key.shape
    block = torch.arange(tokens // MASK_BLOCK, dtype=torch.int32, device=first_key.device)
    reach = first_key[:, ::MASK_BLOCK] // MASK_BLOCK  # (R, T / 128), as everything below
    inside = torch.minimum((first_key[:, MASK_BLOCK - 1::MASK_BLOCK] + (MASK_BLOCK - 1)) // MASK_BLOCK, block)
    key = block.expand(rows, -1).contiguous()
    full_end = torch.searchsorted(inside.contiguous(), key, right=True, out_int32=True)
    partial_end = torch.searchsorted(reach.contiguous(), key, right=True, out_int32=True)

    def listed(first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Intervals of block numbers -> what BlockMask takes: counts (R, 1, N) and lists (R, 1, N, N)."""
        return count[:, None], (first[..., None] + block).clamp_(max=len(block) - 1)[:, None]

    def with_diagonal(first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """The same with each block's own number in front, where the interval is begun one early to make room."""
        counts, numbers = listed(first - 1, count + 1)
        numbers[..., 0] = key[:, None]
        return counts, numbers

    return BlockMask(
        (tokens, tokens),
        *with_diagonal(reach, inside - reach), *listed(inside, block - inside),
        *with_diagonal(full_end, partial_end - full_end), *listed(key + 1, full_end - key - 1),
        BLOCK_SIZE=(MASK_BLOCK, MASK_BLOCK), mask_mod=interval_rule(first_key))


class Span(NamedTuple):
    """A block of queries, the keys any of them sees, and (R, 1, queries, keys) bool: which sees which."""

    queries: slice
    keys: slice
    visible: Tensor


def span_mask(first_key: Tensor, block: int = 2 * MASK_BLOCK) -> list[Span]:
    """(R, T) int32 -> the same mask for scaled_dot_product_attention, where FlexAttention has no backward (CPU)."""
    rows, tokens = first_key.shape
    rule, row = interval_rule(first_key), torch.arange(rows, device=first_key.device)[:, None, None, None]
    position, spans = torch.arange(tokens, device=first_key.device), []
    for begin in range(0, tokens, block):
        queries = slice(begin, min(tokens, begin + block))
        keys = slice(int(first_key[:, begin].min()), queries.stop)
        spans.append(Span(queries, keys, rule(row, None, position[queries, None], position[keys])))
    return spans


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | list[Span]) -> Tensor:
    """Softmax attention with scale 1 / sqrt(K) under a mask; all (R, H, T, K)."""
    if isinstance(mask, BlockMask):
        return flex_attention(query, key, value, block_mask=mask)
    return torch.cat([F.scaled_dot_product_attention(query[:, :, span.queries], key[:, :, span.keys],
                                                     value[:, :, span.keys], span.visible) for span in mask], dim=2)


# ----------------------------------------------------------------------------------------------------------------------
# Model. In: tokens (R, T) and their mask. Out: the last hidden state (R, T, D), from which the loss takes the logits.


def rms_norm(x: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) over the last axis, without gain. The epsilon is explicit because torch's default
    for bf16 changed from 2^-7 to 2^-23 in January 2025, and the five-minute run had the former."""
    return F.rms_norm(x, x.shape[-1:], eps=epsilon)


def rotary_tables(tokens: int, head_width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, K / 2) of position x base^(-2j / K); positions count from the start of the row."""
    frequency = base ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angle = torch.outer(torch.arange(tokens, dtype=torch.float64), frequency)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer): channels j and j + K/2 of (R, H, T, K) turn by their position's angle."""
    low, high = x.chunk(2, dim=-1)
    cosine, sine = cosine[:x.shape[-2]], sine[:x.shape[-2]]
    return torch.cat((low * cosine + high * sine, high * cosine - low * sine), dim=-1)


class Mix(NamedTuple):
    """The learned scalars of one layer, 0-dimensional; None where the technique is off or has no place in the layer."""

    stream: Tensor | None = None
    x0: Tensor | None = None
    value: Tensor | None = None
    skip: Tensor | None = None


class Block(nn.Module):
    """Attention and MLP, each added to the stream. Holds no layer number, so that layers share compiled graphs."""

    def __init__(self, config: Config, dtype: torch.dtype):
        super().__init__()
        self.heads, self.qk_norm, self.epsilon = config.heads, config.qk_norm, config.rms_epsilon
        width, hidden = config.width, config.mlp_ratio * config.width
        self.attention = nn.Parameter(torch.zeros(4, width, width, dtype=dtype))  # query, key, value, output
        self.mlp = nn.Parameter(torch.zeros(2, hidden, width, dtype=dtype))  # up, down transposed

    def forward(self, x: Tensor, x0: Tensor, skip: Tensor | None, first_value: Tensor | None, mix: Mix,
                rotary: tuple[Tensor, Tensor], mask) -> tuple[Tensor, Tensor | None]:
        """Streams (R, T, D) and layer 0's values (R, H, T, K) -> the new stream; layer 0 also returns its values."""
        if skip is not None:
            x = x + mix.skip * skip
        if mix.x0 is not None:
            x = mix.stream * x + mix.x0 * x0
        attended, value = self.attention_part(rms_norm(x, self.epsilon), first_value, mix, rotary, mask)
        x = x + attended
        up, down = self.mlp.to(x.dtype).unbind(0)
        hidden = F.linear(rms_norm(x, self.epsilon), up).relu().square()  # ReLU^2 (Primer): sparse and cheap
        return x + hidden @ down, value if first_value is None else None

    def attention_part(self, x: Tensor, first_value: Tensor | None, mix: Mix, rotary, mask) -> tuple[Tensor, Tensor]:
        into, out = self.attention.to(x.dtype).split((3, 1))
        heads = F.linear(x, into.flatten(0, 1)).view(*x.shape[:2], 3 * self.heads, -1).transpose(1, 2)  # (R, 3 H, T, K)
        match, value = heads.split((2 * self.heads, self.heads), dim=1)
        query, key = rotate(rms_norm(match, self.epsilon) if self.qk_norm else match, *rotary).chunk(2, dim=1)
        mixed = value if mix.value is None else torch.lerp(value, first_value, mix.value.to(value.dtype))
        seen = attend(query, key, mixed, mask)
        return F.linear(seen.transpose(1, 2).flatten(2), out[0]), value


def run_block(block: Block, *arguments) -> tuple[Tensor, Tensor | None]:
    """What is compiled: the block is an argument, so its weights are inputs of the graph and not part of it."""
    return block(*arguments)


class GPT(nn.Module):
    """The language model. Parameters: embedding and head (V, D), per block 12 D^2 (at mlp_ratio 4), a few scalars."""

    def __init__(self, config: Config, vocabulary: int, dtype: torch.dtype):
        """Weights are drawn on the CPU from config.seed, so that every process and device starts from the same ones."""
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        padded = -(-vocabulary // 64) * 64  # matrix units like round sizes; the extra columns are never targets
        master = at_least_float32(dtype)
        draw = torch.Generator().manual_seed(config.seed)
        self.embedding = nn.Parameter(torch.randn(padded, config.width, generator=draw).to(dtype))
        self.blocks = nn.ModuleList(Block(config, master) for _ in range(config.layers))
        for block in self.blocks:  # what adds to the stream, and the head, start at zero: step 0 predicts uniformly
            bound = config.width**-0.5
            for weight in (block.attention[:3], block.mlp[0]):
                weight.data.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=draw))
        self.head = nn.Parameter(torch.zeros(padded, config.width, dtype=master))
        self.mirrored = config.layers // 2 if config.unet_skips else 0  # layers whose output a later one receives
        if config.x0_shortcut:
            self.stream_mix = nn.Parameter(torch.tensor([[1.0, 0.0]] * config.layers, dtype=master))
        if config.value_residual:
            self.value_mix = nn.Parameter(torch.full((config.layers,), 0.5, dtype=master))
        if config.unet_skips:
            self.skip_mix = nn.Parameter(torch.ones(self.mirrored, dtype=master))
        cosine, sine = rotary_tables(config.row_tokens, config.width // config.heads, config.rotary_base, dtype)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)
        self.compiled, self.run_block, self.loss_of_chunk = False, run_block, loss_of_chunk

    def compile_parts(self) -> None:
        """Compile per block, not the whole model: layers of one kind share a graph (the first one, the first half, its
        mirror, the rest), and each gradient is there, and its hook called, as soon as its layer is done."""
        self.compiled = True
        torch._dynamo.config.recompile_limit = 32  # 4 graphs to train and 4 to validate are torch's whole allowance
        self.run_block = torch.compile(run_block, dynamic=False, fullgraph=True)
        self.loss_of_chunk = torch.compile(loss_of_chunk, dynamic=False, fullgraph=True)

    def mixes(self) -> list[Mix]:
        """The scalars of each layer. Layer 0 mixes no values: they are its own."""
        layers, off = self.config.layers, [None] * self.config.layers
        stream, x0 = self.stream_mix.unbind(1) if self.config.x0_shortcut else (off, off)
        value = [None, *self.value_mix.unbind()[1:]] if self.config.value_residual else off
        skip = [None] * (layers - self.mirrored) + (list(self.skip_mix.unbind()) if self.config.unet_skips else [])
        return [Mix(*scalars) for scalars in zip(stream, x0, value, skip, strict=True)]

    def forward(self, inputs: Tensor, mask: BlockMask | list[Span]) -> Tensor:
        """(R, T) int32 and the mask of these rows -> (R, T, D), normalised, ready for the head."""
        x = x0 = rms_norm(F.embedding(inputs, self.embedding), self.config.rms_epsilon)
        outputs, first_value = [], None
        for layer, (block, mix) in enumerate(zip(self.blocks, self.mixes(), strict=True)):
            skip = outputs[self.config.layers - 1 - layer] if mix.skip is not None else None
            arguments = (block, x, x0, skip, first_value, mix, (self.cosine, self.sine), mask)
            if self.config.recompute and torch.is_grad_enabled():
                x, value = recomputed(self.run_block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, value = self.run_block(*arguments)
            if layer < self.mirrored:
                outputs.append(x)
            first_value = value if layer == 0 else first_value
        return rms_norm(x, self.config.rms_epsilon)

    def loss(self, batch: Batch, mask: BlockMask | list[Span]) -> Tensor:
        """Sum, not mean, of the cross-entropies of all targets, in nats, 0-dimensional, at least float32."""
        hidden, targets = self(batch.inputs, mask).flatten(0, 1), batch.targets.flatten()
        return ChunkedLoss.apply(hidden, self.head, targets, self.config, self.loss_of_chunk,
                                 torch.is_grad_enabled())

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., vocabulary), capped, at least float32; the padding columns are left out."""
        raw = F.linear(hidden, self.head[:self.vocabulary].to(hidden.dtype)).to(at_least_float32(hidden.dtype))
        return self.config.softcap * torch.tanh(raw / self.config.softcap) if self.config.softcap else raw


def attention_mask(model: GPT, starts: Tensor, window: int) -> BlockMask | list[Span]:
    """The mask of rows in the form that the model's attention takes: blocks where it is compiled, spans elsewhere."""
    first_key = first_visible_key(starts, window)
    return block_mask(first_key) if model.compiled else span_mask(first_key)


# ----------------------------------------------------------------------------------------------------------------------
# Loss. In: hidden states (N, D), head (V, D), targets (N,). Out: the summed cross-entropy and, while the logits of a
# chunk are at hand, both gradients: full logits (6.6 GB at 65,536 tokens) never exist and nothing is computed twice.


def loss_of_chunk(hidden: Tensor, head: Tensor, targets: Tensor, softcap: float, with_gradient: bool):
    """(n, D), (V, D) of the same dtype, (n,) -> loss; with_gradient also its gradients (n, D) and (V, D)."""
    raw = (hidden @ head.mT).to(at_least_float32(hidden.dtype))  # (n, V)
    counts = (targets >= 0).to(raw.dtype)[:, None]
    target = targets.clamp_min(0)[:, None]
    squashed = torch.tanh(raw / softcap) if softcap else raw
    logits = softcap * squashed if softcap else raw
    normaliser = logits.logsumexp(-1, keepdim=True)
    loss = ((normaliser - logits.gather(1, target)) * counts).sum()
    if not with_gradient:
        return loss, None, None
    column = torch.arange(head.shape[0], device=target.device)
    slope = ((logits - normaliser).exp() - (column == target).to(raw.dtype)) * counts
    slope = (slope * (1 - squashed.square()) if softcap else slope).to(hidden.dtype)
    return loss, slope @ head, slope.mT @ hidden


class ChunkedLoss(torch.autograd.Function):
    """Sum of cross-entropies over chunks of config.loss_chunk tokens; targets of -1 count nothing."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, config: Config, loss_of_chunk,
                with_gradient: bool) -> Tensor:
        narrow_head = head.to(hidden.dtype)
        total = torch.zeros((), dtype=at_least_float32(hidden.dtype), device=hidden.device)
        hidden_slopes, head_slope = [], torch.zeros_like(head) if with_gradient else None
        for chunk, wanted in zip(hidden.split(config.loss_chunk), targets.split(config.loss_chunk), strict=True):
            loss, hidden_part, head_part = loss_of_chunk(chunk, narrow_head, wanted, config.softcap, with_gradient)
            total += loss
            if with_gradient:
                hidden_slopes.append(hidden_part)
                head_slope += head_part
        if with_gradient:
            ctx.save_for_backward(torch.cat(hidden_slopes), head_slope)
        return total

    @staticmethod
    def backward(ctx, slope: Tensor):
        hidden_slope, head_slope = ctx.saved_tensors
        return hidden_slope * slope, head_slope * slope, None, None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers. In: gradients of this process's rows. Out: updated parameters, equal on all processes. Every group of
# parameters lies in one tensor; each process reduces, updates and keeps optimizer state for its own slice of it only.


# torch 2.13 renamed both; 2.11 and 2.12 know the older names only.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group:
    """Parameters of one kind as consecutive slices of one tensor, padded so that it divides among the processes.

    The parameters and their gradients become views of `weights` and `gradients`. A step is reduce (gradients summed,
    each process receives its slice), update (of that slice, in the subclass), gather (slices to all processes). A
    reduction starts by itself in the backward pass, as soon as the last gradient of the group has arrived.
    """

    def __init__(self, name: str, parameters: list[nn.Parameter], item: int, learning_rate: float,
                 processes: Processes):
        """item: how many trailing axes stay whole when it is sliced: 2 for matrices, 1 for rows, 0 for scalars."""
        self.name, self.parameters, self.learning_rate, self.processes = name, parameters, learning_rate, processes
        pieces = [p.data.reshape(-1, *p.shape[p.dim() - item:]) for p in parameters]
        length, world = sum(map(len, pieces)), processes.world
        self.weights = pieces[0].new_zeros(length + (-length) % world, *pieces[0].shape[1:])
        self.gradients = torch.zeros_like(self.weights)
        begin = 0
        for parameter, piece in zip(parameters, pieces, strict=True):
            part = slice(begin, begin := begin + len(piece))
            self.weights[part] = piece
            parameter.data = self.weights[part].view(parameter.shape)
            parameter.grad = self.gradients[part].view(parameter.shape)
            parameter.register_post_accumulate_grad_hook(self.arrived)
        share = len(self.weights) // world
        self.mine = slice(processes.rank * share, (processes.rank + 1) * share)
        self.shard = self.weights[self.mine]
        self.shard_gradient = self.gradients if world == 1 else torch.empty_like(self.shard)
        self.missing, self.work = 0, None
        self.state, self.kernel = [], None  # optimizer buffers and the function that updates the slice

    def compile_update(self) -> None:
        self.kernel = torch.compile(self.kernel, dynamic=False, fullgraph=True)

    def expect_gradients(self) -> None:
        """The next backward pass is the step's last: reduce as soon as every gradient is there. In the passes before,
        the count falls below zero and nothing starts."""
        self.missing = len(self.parameters)

    def arrived(self, _parameter) -> None:
        self.missing -= 1
        if self.missing == 0:
            self.reduce()

    def reduce(self) -> None:
        """Start the sum over processes. The loss is divided by the tokens of the whole step, so it is the mean."""
        if self.processes.world > 1 and self.work is None:
            self.work = reduce_scatter(self.shard_gradient, self.gradients, async_op=True)

    def gather(self) -> None:
        """Start handing the updated slice to all processes; the gradients have been used and are zero again."""
        self.gradients.zero_()
        if self.processes.world > 1:
            self.work = all_gather(self.weights, self.shard, async_op=True)

    def wait(self) -> None:
        """Whatever was started last has ended; on a GPU, what is launched from here on runs after it."""
        if self.work is not None:
            self.work.wait()
        self.work = None

    def scalar(self, value: float) -> Tensor:
        """A number that changes from step to step, as a tensor: a compiled update sees no new constant."""
        return torch.tensor(value, dtype=at_least_float32(self.weights.dtype))


# Coefficients of the quintic a x + b x^3 + c x^5 that drives every singular value towards 1 from anywhere in (0, 1].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def newton_schulz(update: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """(..., rows, columns) -> the same shape in `dtype`: about U V^T of each matrix's U S V^T (Muon).

    Five steps leave the singular values that were above 1 % of the Frobenius norm between 0.68 and 1.14; a zero matrix
    stays zero. The size of the input does not matter, however small: it is divided by its largest entry first.
    """
    smallest = torch.finfo(update.dtype).tiny
    x = update / update.abs().amax((-2, -1), keepdim=True).clamp_min(smallest)
    x = (x / x.square().sum((-2, -1), keepdim=True).sqrt().clamp_min(1)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).reshape(-1, *sorted(x.shape[-2:]))  # (matrices, short side, long side)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(update.shape)


def muon_update(weight: Tensor, gradient: Tensor, momentum: Tensor, scale: Tensor, rate: Tensor, decay: Tensor,
                steps: int, dtype: torch.dtype) -> None:
    """Nesterov momentum in average form, orthogonalised; all (matrices, rows, columns), in place."""
    momentum.mul_(decay).add_(gradient * (1 - decay))
    look_ahead = momentum * decay + gradient * (1 - decay)
    weight.sub_(newton_schulz(look_ahead, steps, dtype) * (scale * rate))


def adam_update(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: Tensor, beta1: float,
                beta2: float, epsilon: float, count: Tensor) -> None:
    """Adam in place; arithmetic in at least float32 whatever the storage, epsilon outside the corrected root."""
    wide = at_least_float32(weight.dtype)
    gradient = gradient.to(wide)
    new_mean = mean.to(wide) * beta1 + gradient * (1 - beta1)
    new_square = square.to(wide) * beta2 + gradient.square() * (1 - beta2)
    step = (new_mean / (1 - beta1**count)) / ((new_square / (1 - beta2**count)).sqrt() + epsilon)
    mean.copy_(new_mean)
    square.copy_(new_square)
    weight.copy_(weight.to(wide) - rate * step)


class Muon(Group):
    """Matrices of one shape, orthogonalised as one batch. State: one momentum buffer for this process's matrices."""

    def __init__(self, name: str, parameters: list[nn.Parameter], scales: list[float], config: Config,
                 dtype: torch.dtype, processes: Processes):
        """scales: for each matrix of a parameter, in order, the factor on its update."""
        super().__init__(name, parameters, 2, config.muon_lr, processes)
        self.config, self.dtype, self.kernel = config, dtype, muon_update
        self.state = [torch.zeros_like(self.shard)]
        padding = len(self.weights) - len(scales) * len(parameters)
        every = torch.tensor(scales * len(parameters) + [1.0] * padding, dtype=self.shard.dtype)
        self.scale = every[self.mine, None, None].to(self.shard.device)

    def update(self, step: int) -> None:
        rate = self.scalar(self.learning_rate * rate_schedule(step, self.config))
        decay = self.scalar(momentum_schedule(step, self.config))
        self.kernel(self.shard, self.shard_gradient, *self.state, self.scale, rate, decay,
                    self.config.newton_schulz_steps, self.dtype)


class Adam(Group):
    """A table or scalars under Adam. State: mean and square of the gradient for this process's slice, in its dtype."""

    def __init__(self, name: str, parameters: list[nn.Parameter], item: int, learning_rate: float, config: Config,
                 processes: Processes):
        super().__init__(name, parameters, item, learning_rate, processes)
        self.config, self.kernel = config, adam_update
        self.state = [torch.zeros_like(self.shard), torch.zeros_like(self.shard)]

    def update(self, step: int) -> None:
        rate = self.scalar(self.learning_rate * rate_schedule(step, self.config))
        self.kernel(self.shard, self.shard_gradient, *self.state, rate, self.config.adam_beta1,
                    self.config.adam_beta2, self.config.adam_epsilon, self.scalar(step + 1.0))


def optimizer_groups(model: GPT, config: Config, dtype: torch.dtype, processes: Processes) -> list[Group]:
    """Every parameter in exactly one group, in the order in which backward completes them."""
    attention, mlp = [b.attention for b in model.blocks], [b.mlp for b in model.blocks]
    up_scale = max(1, config.mlp_ratio) ** 0.5  # Muon's sqrt(max(1, outputs / inputs)); down is wide: 1
    scalars = [p for name, p in model.named_parameters() if name.endswith("_mix")]
    groups = [
        Adam("head", [model.head], 1, config.head_lr, config, processes),
        Muon("mlp", mlp, [up_scale, 1.0], config, dtype, processes),
        Muon("attention", attention, [1.0] * 4, config, dtype, processes),
        *([Adam("scalars", scalars, 0, config.scalar_lr, config, processes)] if scalars else []),
        Adam("embedding", [model.embedding], 1, config.embed_lr, config, processes),
    ]
    if processes.world > 1:
        for group in groups:
            dist.broadcast(group.weights, 0)
    return groups


def apply_updates(groups: list[Group], step: int) -> None:
    """One update of everything. The reduction of one group and the gathering of another run beside the arithmetic."""
    for group in groups:
        group.reduce()
    for group in groups:
        group.wait()
        group.update(step)
        group.gather()
    for group in groups:
        group.wait()


def parameter_table(groups: list[Group]) -> str:
    """What is trained, by which optimizer, at which rate."""
    lines = [f"{'group':10} {'tensors':>7} {'shape':>16} {'dtype':>9} {'parameters':>12} {'optimizer':>9} {'rate':>8}"]
    for group in groups:
        numbers = sum(p.numel() for p in group.parameters)
        shape = " x ".join(map(str, group.weights.shape[1:])) or "-"
        lines.append(f"{group.name:10} {len(group.parameters):7} {shape:>16} {str(group.weights.dtype)[6:]:>9} "
                     f"{numbers:12,} {type(group).__name__:>9} {group.learning_rate:8g}")
    total = sum(p.numel() for group in groups for p in group.parameters)
    return "\n".join([*lines, f"{'total':10} {total:57,}"])


# ----------------------------------------------------------------------------------------------------------------------
# Schedules. In: the step, 0-based. Out: a number. Pure functions; lengths are fractions of the run, so they stretch.


def rate_schedule(step: int, config: Config) -> float:
    """Multiplier of all learning rates: 1, then linear over the last `cooldown` of the run; the last step is not 0."""
    length = round(config.cooldown * config.steps)
    return min(1.0, (config.steps - step) / length) if length else 1.0


def momentum_schedule(step: int, config: Config) -> float:
    """Muon's momentum: from its start to its final value over the first `momentum_warmup` of the run."""
    progress = min(1.0, step / max(1, round(config.momentum_warmup * config.steps)))
    return config.muon_momentum_start + (config.muon_momentum - config.muon_momentum_start) * progress


def window_schedule(step: int, config: Config) -> int:
    """Attention window in tokens, growing over the run in steps of 64: what is near is learned first (record 13)."""
    if config.window_start == config.window:
        return config.window
    grown = config.window_start + (config.window - config.window_start) * min(1.0, step / config.steps)
    return max(config.window_start, int(grown) // 64 * 64)


# ----------------------------------------------------------------------------------------------------------------------
# One step and one validation. In: batches on the device. Out: updated parameters; losses per token in nats.


def train_step(model: GPT, groups: list[Group], batch: Batch, micro_rows: int, step: int) -> Tensor:
    """Forward and backward over the micro-batches, then the update. Returns (processes,) losses, each process's sum
    divided by all tokens of the step, on the device: reading them is left to the caller, who need not wait."""
    config, processes = model.config, groups[0].processes
    window = window_schedule(step, config)
    total = torch.zeros((), dtype=at_least_float32(model.embedding.dtype), device=processes.device)
    for begin in range(0, len(batch.inputs), micro_rows):
        micro = Batch(*(part[begin:begin + micro_rows] for part in batch))
        if begin + micro_rows == len(batch.inputs):
            for group in groups:
                group.expect_gradients()
        loss = model.loss(micro, attention_mask(model, micro.starts, window)) / config.tokens_per_step
        loss.backward()
        total += loss.detach()
    apply_updates(groups, step)
    if processes.world == 1:
        return total[None]
    losses = total.new_empty(processes.world)
    all_gather(losses, total[None])
    return losses


@torch.no_grad()
def validate(model: GPT, stream: TokenStream, tokens: int, micro_rows: int, step: int, processes: Processes) -> float:
    """Mean cross-entropy over the first `tokens` targets of the stream, each counted once, in nats per token.

    Rows go round the processes in groups of micro_rows, so that the shapes are those of training. The last row may be
    ragged. The sum over tokens is divided once, so that the number of processes and the micro size do not matter.
    """
    size = micro_rows * model.config.row_tokens
    passes = -(-tokens // (size * processes.world))
    window = window_schedule(step, model.config)

    def load(index: int) -> Batch:
        position = (index * processes.world + processes.rank) * size
        return read_rows(stream, position, micro_rows, model.config.row_tokens, tokens)

    total = torch.zeros((), dtype=torch.float64, device=processes.device)
    for batch in prefetched(load, passes, processes):
        total += model.loss(batch, attention_mask(model, batch.starts, window))
    if processes.world > 1:
        dist.all_reduce(total)
    return total.item() / tokens


def warm_up(model: GPT, groups: list[Group], batch: Batch, check, micro_rows: int, processes: Processes) -> float:
    """Compile everything on throw-away steps, put every number back, and return the seconds it took.

    From here on a recompilation is an error, so that none can hide inside the timed region.
    """
    begin = time.perf_counter()
    torch.compiler.set_stance("default")
    changed = [tensor for group in groups for tensor in (group.weights, *group.state)]
    kept = [tensor.to("cpu", copy=True) for tensor in changed]  # not on the GPU: they would count as its peak memory
    for step in (0, 1):
        train_step(model, groups, batch, micro_rows, step)
        check(step)
    for tensor, original in zip(changed, kept, strict=True):
        tensor.copy_(original)
    processes.synchronize()
    torch.compiler.set_stance("fail_on_recompile")
    if processes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(processes.device)
    return time.perf_counter() - begin


# ----------------------------------------------------------------------------------------------------------------------
# Log and checkpoint. In: numbers and weights. Out: <out>/<run id>/ with log.txt, metrics.jsonl and model.pt.


class RunLog:
    """What a run leaves behind, written by process 0 only; on the other processes every method does nothing."""

    def __init__(self, config: Config, processes: Processes):
        """Raises Refusal where the folder cannot be made."""
        self.config, self.folder, self.text, self.metrics, self.bar = config, None, None, None, None
        if processes.rank > 0:
            return
        folder = Path(config.out) / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        try:
            folder.mkdir(parents=True)
            self.text = open(folder / "log.txt", "w", buffering=1, encoding="utf-8")
            self.metrics = open(folder / "metrics.jsonl", "w", buffering=1, encoding="utf-8")
        except OSError as error:
            raise Refusal(f"cannot write the run folder {folder}: {error.strerror}; name a writable place with --out "
                          "FOLDER") from None
        self.folder = folder
        self.text.write(Path(__file__).read_text(encoding="utf-8") + "\n" + "=" * 100 + "\n")
        if sys.stderr.isatty():
            self.bar = tqdm(total=config.steps, unit="step", dynamic_ncols=True)

    def line(self, text: str, show: bool = True) -> None:
        if self.folder is None:
            return
        self.text.write(text + "\n")
        if show:
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # nobody reads any more, as behind `| head`: the run goes on without
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def measured(self, step: int, seconds: float, **losses: float) -> None:
        """One object in metrics.jsonl, and a line as speedrun logs have it; `step` counts the updates done."""
        if self.folder is None:
            return
        tokens = step * self.config.tokens_per_step
        record = {"step": step, "tokens": tokens, **losses, "train_time_s": round(seconds, 6)}
        self.metrics.write(json.dumps(record) + "\n")
        kind, loss = next(iter(losses.items()))
        if kind == "val_loss" or step % 10 == 0 or step < 10:
            self.line(f"step:{step}/{self.config.steps} {kind}:{loss:.4f} train_time:{1000 * seconds:.0f}ms "
                      f"step_avg:{1000 * seconds / max(1, step):.2f}ms", show=kind == "val_loss" or self.bar is None)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{kind} {loss:.4f}, {tokens / max(seconds, 1e-9):,.0f} tokens/s")
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        for part in (self.bar, self.text, self.metrics):
            if part is not None:
                part.close()


def environment(processes: Processes) -> str:
    """Versions and hardware, for the log."""
    lines = [f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
             f"{platform.system()} {platform.machine()}, {processes.world} process(es)"]
    if processes.device.type == "cuda":
        lines.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(processes.device)}")
        if processes.rank == 0 and shutil.which("nvidia-smi"):
            lines.append(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
    else:
        bf16 = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
        lines.append(f"CPU, {torch.get_num_threads()} threads per process, {os.cpu_count()} cores, {bf16} avx512_bf16")
    return "\n".join(lines)


def peak_memory(device: torch.device) -> float:
    """Most memory this process has held so far, in MiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# Dense bf16 peak of one GPU in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def flops_per_token(config: Config, vocabulary: int) -> float:
    """Multiplications and additions of training one token: 6 per matrix parameter, 12 D per visible key and layer.
    Keys are those of the causal window; that documents end earlier is not subtracted."""
    matrices = config.layers * (4 + 2 * config.mlp_ratio) * config.width**2 + vocabulary * config.width
    window = min(config.window, config.row_tokens)
    keys = window - window * (window - 1) / (2 * config.row_tokens)
    return 6 * matrices + 12 * config.layers * config.width * keys


def utilisation(config: Config, vocabulary: int, tokens_per_second: float, processes: Processes,
                dtype: torch.dtype) -> str:
    """Share of the GPUs' peak that the model's arithmetic uses; "unknown" where the peak is."""
    name = torch.cuda.get_device_name(processes.device) if processes.device.type == "cuda" else ""
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    if peak is None or dtype != torch.bfloat16:
        return "unknown"
    return f"{100 * tokens_per_second * flops_per_token(config, vocabulary) / (peak * processes.world):.1f} %"


def save_model(path: Path, model: GPT, stream: TokenStream, step: int, val_loss: float) -> None:
    """Weights and plain values, for `torch.load(weights_only=True)`; a temporary name until it is whole. Raises Refusal
    where it cannot be written."""
    partial = path.with_suffix(".partial")
    saved = {"config": dataclasses.asdict(model.config), "vocabulary": stream.vocabulary,
             "separator": stream.separator, "dtype": str(model.embedding.dtype).removeprefix("torch."),
             "step": step, "val_loss": val_loss,
             "weights": {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}}
    try:
        torch.save(saved, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        partial.unlink(missing_ok=True)
        raise Refusal(f"cannot write {path}: {' '.join(str(error).split())[:200]}; make room there, or name another "
                      "folder with --out FOLDER") from None


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, dict]:
    """A model that `save_model` wrote, and the values beside it. Raises Refusal for any other file."""
    expected = "expected a model.pt written by this train_gpt2.py; train one: python train_gpt2.py --preset tiny"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**saved["config"])
        model = GPT(config, saved["vocabulary"], getattr(torch, saved["dtype"]))
        model.load_state_dict(saved["weights"])
    except Exception as error:  # whatever the file system, the unpickler or the shapes object to
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise Refusal(f"cannot use {path} as a checkpoint: {type(error).__name__}, {reason}; {expected}") from None
    return model.to(device), saved


# ----------------------------------------------------------------------------------------------------------------------
# Training loop. In: a Config. Out: the trained model and the run folder.


def open_data(config: Config) -> tuple[TokenStream, TokenStream, int]:
    """Both streams and the number of validation tokens. Raises Refusal before anything is computed or written."""
    train, val = TokenStream(config.train_files), TokenStream(config.val_files)
    if (train.vocabulary, train.separator) != (val.vocabulary, val.separator):
        raise Refusal(f"training shards have (vocabulary, separator) {train.vocabulary, train.separator}, validation "
                      f"shards {val.vocabulary, val.separator}; encode both alike: {shard_command(config.train_files)}")
    needed = config.steps * config.tokens_per_step + 1
    if needed > train.tokens and not config.repeat:
        shards = len(train.shards) + math.ceil((needed - train.tokens) / max(s.tokens for s in train.shards))
        most = (train.tokens - 1) // config.tokens_per_step
        raise Refusal(f"the run needs {needed:,} training tokens, {config.train_files} holds {train.tokens:,}; get "
                      f"more: {shard_command(config.train_files, shards)}; or give --repeat true"
                      + f" or --steps {most}" * (most > 0))
    for stream, pattern, least in ((train, config.train_files, config.row_tokens + 1), (val, config.val_files, 2)):
        if stream.tokens < least:
            raise Refusal(f"{pattern} holds {stream.tokens} token{'s' * (stream.tokens > 1)}, expected {least} or "
                          f"more; get them: {shard_command(pattern)}")
    return train, val, min(config.val_tokens, val.tokens - 1)


class Clock:
    """Seconds of training. It is stopped, after the device has finished, while anything else runs."""

    def __init__(self, processes: Processes):
        self.processes, self.seconds, self.started = processes, 0.0, None

    def start(self) -> None:
        """Go on, if it stands still."""
        if self.started is None:
            self.processes.synchronize()
            self.started = time.perf_counter()

    def stop(self) -> None:
        self.processes.synchronize()
        self.seconds, self.started = self.now(), None

    def now(self) -> float:
        return self.seconds + (time.perf_counter() - self.started if self.started is not None else 0.0)


def can_compile(config: Config, processes: Processes, dtype: torch.dtype, log: RunLog) -> bool:
    """Whether the model runs compiled. Raises Refusal for what the kernels of FlexAttention do not take."""
    if config.compile == "none" or processes.device.type != "cuda":
        return False
    head_width = config.width // config.heads
    if head_width < 16 or dtype == torch.float64:
        raise Refusal(f"attention heads of {head_width} channels in {str(dtype)[6:]} cannot be compiled, expected at "
                      "least 16 in bfloat16 or float32; give --compile none")
    if importlib.util.find_spec("triton") is None:
        log.line("notice: Triton is not installed, so nothing is compiled: the same numbers, slower")
        return False
    return True


def train(config: Config, processes: Processes) -> Path | None:
    """The whole run. Returns the run folder (None on processes other than 0). Raises Refusal, or leaves a model."""
    micro_rows = rows_per_micro(config, processes.world, processes.device)
    dtype = compute_dtype(config, processes.device)
    stream, val_stream, val_tokens = open_data(config)
    log = RunLog(config, processes)
    log.line(environment(processes), show=False)
    log.line(json.dumps(dataclasses.asdict(config)), show=False)

    model = GPT(config, stream.vocabulary, dtype).to(processes.device)
    groups = optimizer_groups(model, config, dtype, processes)
    passes = config.tokens_per_step // (micro_rows * config.row_tokens * processes.world)
    log.line(parameter_table(groups))
    log.line(f"{config.preset}: {config.steps} steps of {config.tokens_per_step:,} tokens in rows of "
             f"{config.row_tokens:,}; {processes.world} process(es) on {processes.device.type}, {str(dtype)[6:]}, "
             f"{passes} x {micro_rows} rows each")
    if val_tokens < config.val_tokens:
        log.line(f"notice: validating on all {val_tokens:,} targets of {config.val_files}, fewer than --val-tokens "
                 f"{config.val_tokens}")

    load = functools.partial(step_batch, stream, config, processes)

    def judge(step: int, tokens: int = val_tokens) -> float:
        return validate(model, val_stream, tokens, micro_rows, step, processes)

    if can_compile(config, processes, dtype, log):
        model.compile_parts()
        for group in groups:
            group.compile_update()
        first = next(prefetched(load, 1, processes))
        seconds = warm_up(model, groups, first, lambda step: judge(step, tokens=1), micro_rows, processes)
        log.line(f"compiled in {seconds:.0f} s, untimed")

    clock, underway = Clock(processes), deque()  # the losses of steps that the device has been given but not read
    ahead = 1 if processes.device.type == "cuda" else 0  # how many of them there may be
    lower_rates = "try lower rates (--muon-lr, --embed-lr, --head-lr) or look at the tokens of that step"

    def read_loss(step: int, losses: Tensor, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        bad = [rank for rank, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
        if bad:
            raise Refusal(f"the training loss of step {step + 1} is not finite in process {', '.join(map(str, bad))}; "
                          f"expected a number; no model was written; {lower_rates}")
        log.measured(step + 1, clock.now(), train_loss=float(losses.sum()))

    batches = prefetched(load, config.steps, processes)
    for step in range(config.steps + 1):
        if step in (0, config.steps) or (config.val_every and step % config.val_every == 0):
            clock.stop()
            while underway:
                read_loss(*underway.popleft())
            val_loss = judge(step)
            if not math.isfinite(val_loss):
                raise Refusal(f"the validation loss after {step} steps is not finite; expected a number; no model was "
                              f"written; {lower_rates}")
            log.measured(step, clock.now(), val_loss=val_loss,
                         peak_memory_mib=round(peak_memory(processes.device), 1))
        if step == config.steps:
            break
        clock.start()
        losses = train_step(model, groups, next(batches), micro_rows, step)
        underway.append((step, losses.to("cpu", non_blocking=True), processes.event()))
        while len(underway) > ahead:
            read_loss(*underway.popleft())
    if log.folder is not None:
        save_model(log.folder / "model.pt", model, stream, config.steps, val_loss)
    speed = config.steps * config.tokens_per_step / clock.now()
    used = utilisation(config, stream.vocabulary, speed, processes, dtype)
    log.line(f"final val_loss {val_loss:.4f} nats per token, training time {clock.now():.2f} s, {speed:,.0f} tokens/s, "
             f"model FLOP utilisation {used}, peak memory {peak_memory(processes.device):,.0f} MiB; "
             f"all of it in {log.folder}")
    log.close()
    return log.folder


def main(arguments: list[str] | None = None) -> None:
    """The command line. Every process sees the same bad input: process 0 says so, the others leave it the word."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less waste where sizes vary
    try:
        config = parse_command_line(sys.argv[1:] if arguments is None else arguments)
        train(config, start_processes(config))
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", "0")) == 0:
            print("interrupted: losses so far are in the run folder; no model was written", file=sys.stderr)
        raise SystemExit(130) from None  # 128 + SIGINT, as shells count
    except (Refusal, torch.OutOfMemoryError) as error:
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(5)  # torchrun ends the job when process 0 has spoken; what only this process saw is said after
        if isinstance(error, Refusal):
            raise
        raise Refusal("the GPU has too little memory; the same training needs less of it with --recompute true "
                      "--loss-chunk 2048") from None
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
