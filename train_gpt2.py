"""Train a GPT-2-class model to 3.28 validation loss on FineWeb: the hundred-second recipe on 8 H100s, in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt2.py     # the hundred-second recipe
    python train_gpt2.py --preset five-minute                  # where it came from: 124M, Muon, FlexAttention
    python train_gpt2.py --preset gpt2-medium                  # 613M to 2.92; gpt2-xl: the 1.5B of October 2024
    python train_gpt2.py --preset tiny                         # a small model through the same code, on a CPU
    python train_gpt2.py --help                                # every setting, with its default and unit

The file reads from top to bottom in the order the data flows:

    configuration -> schedules -> processes -> shards to rows -> rows to attention masks -> model -> loss -> optimizers
    -> one step, validation -> log and checkpoint -> training loop

Importing it does nothing. State lives in three places only: a frozen Config, the model's parameters, and the groups of
the optimizers. Sizes are in tokens unless a name says otherwise. Shapes: R rows, T tokens per row, D width, H heads,
K = D / H, V vocabulary, L layers. A technique says which record of the NanoGPT speedrun brought it, as (#49).
"""

import contextlib
import ctypes
import dataclasses
import difflib
import functools
import glob
import hashlib
import importlib.util
import json
import logging
import math
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, get_args, get_origin

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

    def __init__(self, line: str):
        super().__init__(" ".join(line.splitlines()))  # what was found may hold line ends


def setting(default, unit: str, reason: str, low: float = 0, high: float = math.inf):
    """Lists "by stage" hold a value for each part of the run, the last goes on; other lists as many as the default."""
    return field(default=default, metadata={"unit": unit, "reason": reason, "low": low, "high": high})


Ints, Floats, ADAM = tuple[int, ...], tuple[float, ...], "rate,beta1,beta2,decay"
MOST_STAGES = 16


@dataclass(frozen=True)
class Config:
    """One run. The defaults are the hundred-second recipe (#62); `PRESETS` holds what the others change."""

    preset: str = setting("gpt2", "name", "which set of defaults the other options start from")
    # what to train on
    train_files: str = setting("data/fineweb10B/fineweb_train_*.bin", "glob", "training shards, read in name order")
    val_files: str = setting("data/fineweb10B/fineweb_val_*.bin", "glob", "validation shards")
    repeat: bool = setting(False, "true|false", "start over when the training shards are used up")
    shuffle: bool = setting(False, "true|false", "take rows from all over the shards, each once, not in their order")
    long_documents: str = setting("drop", "drop|continue", "what is cut off a document: dropped, or the next document")
    document_tokens: int = setting(2048, "tokens", "a document is cut at this length; 0: by the row's end only")
    document_mask: bool = setting(True, "true|false", "attention stays within a document of the row")
    cross_document: bool = setting(True, "true|false", "smear, key offset and bigrams look back over document borders")
    # how much at a time
    steps: int = setting(1600, "updates", "length of the run; schedules stretch with it", 1)
    stages: int = setting(3, "count", "equal parts of the schedule; the extension is one stage more", 1, MOST_STAGES)
    extension: float = setting(0.025, "of steps", "end of the run beyond the schedule, its rates at the floor", 0, 0.9)
    tokens_per_step: Ints = setting((131_072, 262_144, 393_216), "tokens, by stage", "batch of one update in all", 1)
    row_tokens: Ints = setting((16_384, 32_768, 49_152), "tokens, by stage", "what attention sees at once", 1, 2**24)
    micro_tokens: int = setting(0, "tokens", "most per forward pass, one row at least; 0 or auto: what fits, to 65,536")
    recompute: bool = setting(False, "true|false", "recompute block activations in backward, for small memories")
    loss_chunk: int = setting(8192, "tokens", "logits held at once by the loss", 1)
    # how it is judged
    val_every: int = setting(250, "updates", "distance between validations; 0: only the first and the last")
    val_tokens: int = setting(10_485_760, "tokens", "validation tokens, always the first ones of the shards", 1)
    val_row_tokens: int = setting(262_144, "tokens", "row in validation", 1, 2**24)
    # the model
    layers: int = setting(11, "count", "transformer blocks", 1, 1000)
    heads: int = setting(6, "count", "attention heads", 1)
    width: int = setting(768, "channels", "residual stream", 2, 2**20)
    mlp_ratio: int = setting(4, "times width", "hidden channels of the MLP", 1, 1000)
    window: Ints = setting((384, 896, 1408, 1664), "tokens, by stage", "how far back a query sees", 1)
    window_short: Ints = setting((128, 384, 640, 768), "tokens, by stage", "the same in --short-layers", 1)
    window_final: int = setting(2560, "tokens", "window of the last validation; 0: that of training")
    short_layers: Ints = setting((0, 1, 2, 4, 5, 7, 8, 9), "layers", "layers with the short window")
    paired_layers: Ints = setting((0, 2, 5, 9), "layers", "layers whose heads attend in pairs over 2 T positions")
    attention_free: Ints = setting((6,), "layers", "layers that are an MLP only")
    qk_norm: bool = setting(True, "true|false", "normalise queries and keys per head: attention logits stay bounded")
    attention_scale: float = setting(0.1, "-", "softmax scale in the first stage; 0: 1 / sqrt(head width)", 0, 1000)
    rotary_base: float = setting(1024 ** (32 / 31), "-", "slowest rotary wavelength / 2 pi, about", 1)
    rotary_share: float = setting(0.5, "of channels", "turned by position; the others match by content alone", 0, 1)
    yarn: int = setting(3, "stages", "first ones in which wavelengths and softmax follow the window; 0: none")
    key_offset: bool = setting(True, "true|false", "long-window keys: the still channels come from the token before")
    attention_gates: bool = setting(True, "true|false", "each head can close itself")
    gate_channels: int = setting(12, "channels", "of the stream that a gate sees; all, where there are fewer", 1)
    attention_mix: bool = setting(True, "true|false", "learned scalars on attention's input and output matrices")
    value_layers: Ints = setting((0, 1, 8, 9, 10), "layers", "layers that add an embedding of the token to values")
    value_tables: int = setting(3, "count", "tables of these embeddings, taken in turn", 1)
    value_gates: bool = setting(True, "true|false", "each head weighs its value embedding")
    value_residual: bool = setting(False, "true|false", "each layer mixes layer 0's values into its own")
    bigram: int = setting(5, "times vocabulary", "rows of a hashed table of token pairs on the stream; 0: off", 0, 1000)
    second_embedding: bool = setting(False, "true|false", "each block mixes in another embedding of the token as well")
    embedding_norm: bool = setting(True, "true|false", "normalise the embedding before the first block")
    smear: bool = setting(True, "true|false", "each token's embedding takes up some of the one before")
    x0_shortcut: bool = setting(True, "true|false", "each block mixes the embedding back into the stream")
    residual_init: float = setting(1.1, "-", "first weight of the stream in that mixture", 0, 1000)
    gated_skip: Ints = setting((3, 6), "layers", "pairs: the first one's output is added, gated, before the second")
    unet_skips: bool = setting(False, "true|false", "feed the first half's outputs to the second half, mirrored")
    backout: Ints = setting((7,), "layers", "layer whose output is in part subtracted before the head")
    rms_epsilon: float = setting(2.0**-23, "-", "added to the mean square before its root")
    softcap: Floats = setting((11.5, 15.0, 5.0), "height,range,shift", "height x tanh((logit + shift) / range); 0: off")
    predicted_tokens: int = setting(3, "count", "tokens predicted ahead in the first stage, later fewer", 1, 64)
    tied_until: float = setting(2 / 3, "of schedule", "embedding and head are one table till then; 0: never", 0, 1)
    tied_init: float = setting(0.005, "-", "spread of the first embedding where it is the head as well", 0, 1000)
    attention_init: float = setting(1.0, "/ sqrt(width)", "spread of the first query, key and value weights", 0, 1000)
    mlp_init: float = setting(0.5, "/ sqrt(width)", "spread of the first up weights", 0, 1000)
    # the optimizers
    muon_lr: float = setting(0.023, "-", "block matrices: step length in units of an orthogonal matrix")
    muon_momentum: float = setting(0.95, "-", "momentum of Muon in the middle of the run", 0, 0.9999)
    muon_momentum_start: float = setting(0.85, "-", "at both ends; equal to muon_momentum: constant", 0, 0.9999)
    momentum_warmup: float = setting(300 / 1600, "of steps", "length of its rise", 0, 1)
    momentum_cooldown: float = setting(50 / 1600, "of steps", "length of its fall at the end; 0: none", 0, 1)
    orthogonaliser: str = setting("polar-express", "polar-express|newton-schulz|none", "Muon's iteration")
    normuon_beta2: float = setting(0.95, "-", "NorMuon: equalise rows by their running mean square; 0: off", 0, 0.9999)
    muon_decay: float = setting(1.2, "-", "cautious weight decay, times the rate twice; 0: none")
    attention_step: float = setting(1.0, "-", "factor on the step of attention's matrices")
    down_scale: float = setting(4.0, "-", "factor on the step of the MLP's down matrices")
    muon_gates: float = setting(0.0, "-", "Muon for the gates of attention, factor on their step; 0: Adam")
    split_precision: bool = setting(True, "true|false", "bfloat16 matrices, their 16 low bits beside the optimizer")
    adam_embedding: Floats = setting((0.008, 0.5, 0.95, 0.75), ADAM, "Adam, token embedding once it is untied")
    adam_head: Floats = setting((0.008, 0.5, 0.95, 0.75), ADAM, "Adam, output head, and embedding while tied")
    adam_tables: Floats = setting((0.6, 0.75, 0.95, 0.025), ADAM, "Adam, the other tables: by token or by pair of them")
    adam_gates: Floats = setting((0.008, 0.9, 0.99, 0.005), ADAM, "Adam, gates")
    gate_shares: Floats = setting((0.01, 0.05), "smear,skip", "their gates' part of the rate of gates; no decay")
    adam_x0: Floats = setting((0.04, 0.65, 0.95, 0.0), ADAM, "Adam, weights of the embedding in the stream")
    adam_scalars: Floats = setting((0.04, 0.9, 0.99, 0.0), ADAM, "Adam, the other mixing weights")
    adam_epsilon: float = setting(1e-10 / 16_384, "-", "added to the root of the bias-corrected squares")
    adam_every: int = setting(2, "steps", "Adam updates once in so many steps, with their summed gradients", 1)
    cooldown: float = setting(0.55, "of schedule", "last part, rates linear to their floor; 0: none", 0, 1)
    rate_levels: Floats = setting((1.0, 1.52, 1.73), "-, by stage", "factor on all rates: grows with the batch")
    rate_floor: float = setting(0.1, "-", "what remains of the rates at the end")
    # the machine
    seed: int = setting(0, "-", "seed of the initial weights and of the shuffle", 0, 2**63 - 1)
    device: str = setting("auto", "auto|cpu|cuda", "auto: the GPU if there is one")
    dtype: str = setting("auto", "auto|bfloat16|float32|float64", "auto: bfloat16 where the hardware is made for it")
    head_dtype: str = setting("auto", "auto|float8|wide", "head in training; auto: float8 on GPUs that have it")
    compile: str = setting("auto", "auto|none", "auto: torch.compile with FlexAttention on a GPU, eager on a CPU")
    patience: int = setting(300, "s", "longest wait for another process; an hour while one compiles", 1, 86_400)
    # what is kept
    out: str = setting("logs", "folder", "where the run's own folder is made")
    save_every: int = setting(0, "updates", "distance between checkpoints; 0: only when the run is told to stop")
    keep: int = setting(2, "count", "newest checkpoints of a run that are kept", 1)
    resume: str = setting("none", "none, auto, path", "a checkpoint to go on from; auto: this run's newest, if any")


PLAIN = {  # what the smaller presets do not take from the hundred-second recipe, at its neutral value
    "long_documents": "continue", "window_final": 0, "short_layers": (), "attention_free": (), "attention_scale": 0.0,
    "attention_gates": False, "attention_mix": False, "gated_skip": (), "softcap": (30.0, 30.0, 0.0),
    "predicted_tokens": 1, "tied_until": 0.0, "attention_init": 3**-0.5, "mlp_init": 3**-0.5, "down_scale": 1.0,
    "adam_every": 1, "rate_levels": (1.0,)}
EARLY = PLAIN | {  # nor the runs of 2024, which had Muon, QK norm and little else of it
    "document_tokens": 0, "extension": 0.0, "val_every": 125, "paired_layers": (), "rotary_base": 10_000.0,
    "rotary_share": 1.0, "yarn": 0, "key_offset": False, "value_layers": (), "value_gates": False, "bigram": 0,
    "smear": False, "residual_init": 1.0, "backout": (), "momentum_cooldown": 0.0, "orthogonaliser": "newton-schulz",
    "normuon_beta2": 0.0, "muon_decay": 0.0, "split_precision": False, "adam_epsilon": 1e-8, "rate_floor": 0.0,
    "head_dtype": "wide"}
PRESETS = {
    "gpt2": {},
    "five-minute": EARLY | {  # record 12
        "steps": 1875, "tokens_per_step": (524_288,), "row_tokens": (65_536,), "val_row_tokens": 65_536, "layers": 12,
        "window": (1023,), "value_residual": True, "unet_skips": True, "rms_epsilon": 2.0**-7, "muon_lr": 0.04,
        "momentum_warmup": 500 / 1875, "adam_embedding": (0.6, 0.9, 0.95, 0.0), "adam_head": (0.008, 0.9, 0.95, 0.0),
        "adam_x0": (0.04, 0.9, 0.95, 0.0), "adam_scalars": (0.04, 0.9, 0.95, 0.0), "cooldown": 562 / 1875},
    "gpt2-medium": {  # 2.92 in 17 minutes: record 18 of the medium track
        "document_tokens": 4096, "steps": 4740, "stages": 12, "extension": 40 / 4740,
        "tokens_per_step": (131_072, 262_144, 393_216, 524_288), "row_tokens": (16_384, 32_768, 49_152, 65_536),
        "layers": 16, "heads": 8, "width": 1024, "window": (384, 896, 1408, 1664, 1920, 2176, 2432, 2688, 2944),
        "window_short": (128, 384, 640, 768, 896, 1024, 1152, 1280, 1408), "window_final": 3456,
        "short_layers": (1, 2, 3, 5, 6, 7, 8, 9, 10, 12, 13, 14), "paired_layers": (), "attention_free": (),
        "gate_channels": 16, "value_layers": (0, 1, 2, 3, 4, 11, 12, 13, 14, 15), "value_tables": 5, "bigram": 0,
        "second_embedding": True, "residual_init": 1.05, "gated_skip": (6, 9, 4, 10, 2, 11), "backout": (11,),
        "tied_until": 1 / 6, "muon_lr": 0.015, "momentum_warmup": 300 / 4740, "momentum_cooldown": 50 / 4740,
        "attention_step": 2.0, "muon_gates": 0.1, "split_precision": False, "adam_embedding": (0.004, 0.8, 0.95, 0.75),
        "adam_head": (0.004, 0.8, 0.95, 0.75), "adam_tables": (0.3, 0.8, 0.95, 0.025),
        "adam_gates": (0.004, 0.8, 0.95, 0.005), "gate_shares": (0.01, 0.01), "adam_x0": (0.02, 0.8, 0.95, 0.0),
        "adam_epsilon": 1e-8 / 16_384, "cooldown": 0.7, "rate_levels": (1.0, 1.52, 1.73, 2.0), "head_dtype": "wide"},
    "gpt2-xl": EARLY | {  # 1.5B parameters, as good as GPT-2 XL for $233: October 2024, a plain model
        "document_mask": False, "steps": 20_344, "tokens_per_step": (491_520,), "row_tokens": (1024,),
        "val_row_tokens": 1024, "layers": 52, "heads": 12, "width": 1536, "window": (1023,), "embedding_norm": False,
        "x0_shortcut": False, "softcap": (0.0, 1.0, 0.0), "tied_until": 1.0, "tied_init": (3 * 1536) ** -0.5,
        "muon_lr": 0.00018 * 1536**0.5, "muon_momentum_start": 0.95, "down_scale": 2.0,
        "adam_head": (0.0018, 0.9, 0.95, 0.0), "cooldown": 5812 / 20_344},
    "tiny": PLAIN | {  # what of the recipe a run of minutes on a CPU has use for, at rates for such a run
        "train_files": "data/text/text_train_*.bin", "val_files": "data/text/text_val_*.bin", "shuffle": True,
        "steps": 640, "tokens_per_step": (1024,), "row_tokens": (128,), "val_every": 40, "val_tokens": 131_072,
        "val_row_tokens": 128, "layers": 3, "heads": 2, "width": 128, "window": (128,), "paired_layers": (0,),
        "value_layers": (0, 2), "bigram": 16, "backout": (1,), "muon_lr": 0.08, "muon_momentum": 0.8,
        "muon_momentum_start": 0.8, "adam_embedding": (0.6, 0.65, 0.95, 0.0),
        "adam_head": (0.008, 0.65, 0.95, 0.0), "adam_tables": (0.3, 0.65, 0.95, 0.0), "cooldown": 0.8}}


def parse_command_line(arguments: list[str]) -> Config:
    """`--any-field VALUE`, `--any_field=VALUE` on top of a preset. Raises Refusal, naming the nearest valid option."""
    options, given = {f.name: f for f in fields(Config)}, {}
    words = [word for word in arguments if word not in ("-h", "--help")]
    wants_help = len(words) < len(arguments)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag[:1] not in ("", "-"):
            raise Refusal(f"{flag} is no option: options begin with --, as --steps 100 (python train_gpt2.py --help "
                          "lists all)")
        if not flag.startswith("--") or name not in options:
            raise Refusal(f"unknown option {flag}; the nearest is {spelled_flag(nearest(name, options))} "
                          "(python train_gpt2.py --help lists all)")
        if name in given:
            raise Refusal(f"{flag} is given twice; give it once")
        if not equals and not words:
            raise Refusal(f"{flag} needs a value; for example {flag} {spelled(options[name].default)}")
        given[name] = parse_value(flag, value if equals else words.pop(0), options[name])
    defaults = PRESETS[given.get("preset", Config.preset)] | {"preset": given.get("preset", Config.preset)}
    if given.get("resume", "none") not in ("none", "auto"):  # the run's own settings, but for those given now
        saved = find_checkpoint(given["resume"], whole=False)
        defaults = dataclasses.asdict(config_of(saved))
        if given.get("preset", defaults["preset"]) != defaults["preset"]:
            raise Refusal(f"{saved['path']} goes on with --preset {defaults['preset']}, not {given['preset']}; leave "
                          "that out")
    if wants_help:
        print(__doc__.split("\n\nThe file")[0])
        print(f"\nSettings, with the defaults of --preset {defaults['preset']} (presets: {', '.join(PRESETS)}):\n")
        for name, option in options.items():
            value, (unit, reason, *_) = spelled(defaults.get(name, option.default)), option.metadata.values()
            print(f"  {spelled_flag(name):22} {value:>20} [{unit}]  {reason}")
        raise SystemExit(0)
    return check_config(Config(**defaults | given))


def spelled(value, exact: bool = False) -> str:
    """A setting's value as it is typed, floats to six digits or exact."""
    if isinstance(value, tuple):
        return ",".join(spelled(part, exact) for part in value) or "none"
    if isinstance(value, float):
        return repr(value) if exact else f"{value:.6g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def spelled_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def nearest(word: str, words) -> str:
    return difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.0)[0]


def parse_value(flag: str, text: str, option: dataclasses.Field):
    """The text as the option's type, within its range or among its words (`auto|none`). Raises Refusal."""
    words = list(PRESETS) if option.name == "preset" else option.metadata["unit"].split("|")
    if len(words) > 1 and text not in words:
        raise Refusal(f"{flag} {text} is not one of {', '.join(words)}; the nearest is {flag} {nearest(text, words)}")
    if option.type in (bool, str):
        return text == "true" if option.type is bool else text
    unit, _, low, high = option.metadata.values()
    if option.name == "micro_tokens" and text == "auto":
        return 0
    is_list = get_origin(option.type) is tuple
    kind = get_args(option.type)[0] if is_list else option.type
    counts = (range(1, MOST_STAGES + 2) if unit.endswith("by stage") else range(1000) if unit == "layers" else
              [len(option.default) if is_list else 1])
    try:
        values = tuple(map(kind, text.split(",") if not is_list or text != "none" else ()))
        valid = len(values) in counts and all(low <= value <= high and math.isfinite(value) for value in values)
    except (ValueError, OverflowError):
        valid = False
    if not valid:
        count = "" if unit == "layers" else f"{counts[0]} to {counts[-1]} " if len(counts) > 1 else f"{counts[0]} "
        what = (f"a list of {count}" if is_list else "a ") + "whole " * (kind is int) + "number" + "s" * is_list
        bounds = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
        raise Refusal(f"{flag} {text} is not {what} {bounds}{', joined by commas' * is_list}; "
                      f"for example {flag} {spelled(option.default)}")
    return values if is_list else values[0]


def check_config(config: Config) -> Config:
    """Returns it. Raises Refusal for combinations that cannot work, each with the nearest value that does."""
    def refuse(name: str, problem: str, better) -> None:
        raise Refusal(f"{spelled_flag(name)} {spelled(getattr(config, name))} {problem}; "
                      f"the nearest is {spelled_flag(name)} {spelled(better)}")

    long = [f.name for f in fields(Config)
            if f.metadata["unit"].endswith("by stage") and len(getattr(config, f.name)) > config.stages + 1]
    if len(long) > 1:
        raise Refusal(f"--stages {config.stages} and the extension take {config.stages + 1} values at most, more have "
                      f"{', '.join(map(spelled_flag, long))}; shorten these, or give more --stages")
    for name in long:
        refuse(name, f"is longer than --stages {config.stages} and the extension",
               getattr(config, name)[:config.stages + 1])
    for f in fields(Config):
        value = getattr(config, f.name)
        if f.metadata["unit"] == "layers" and any(layer >= config.layers for layer in value):
            refuse(f.name, f"names layers beyond the last of --layers {config.layers}, which is {config.layers - 1}",
                   () if f.name == "gated_skip" else tuple(layer for layer in value if layer < config.layers))
        if f.metadata["unit"] == ADAM and max(value[1:3]) >= 1:
            refuse(f.name, "has a beta of 1 or more", f.default)
    if config.paired_layers and config.heads % 2:
        refuse("heads", "cannot be paired (--paired-layers none does without)", config.heads + 1)
    divisible = {"row_tokens": ((MASK_BLOCK,), "mask blocks"), "val_row_tokens": ((MASK_BLOCK,), "mask blocks"),
                 "gate_channels": ((4,), "fours: each gate begins on 16 bytes"),
                 "tokens_per_step": (config.row_tokens, "rows"), "width": ((2 * config.heads,), "pairs for each head")}
    for name, (units, what) in divisible.items():
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        pairs = [(value_at(values, i), value_at(units, i)) for i in range(max(len(values), len(units)))]
        if any(number % unit for number, unit in pairs):
            better = tuple(max(1, round(number / unit)) * unit for number, unit in pairs)
            refuse(name, f"is not a whole number of {what} ({spelled(units)})", better)
    sources, takers = config.gated_skip[::2], config.gated_skip[1::2]
    if len(sources) != len({*takers}) or any(a >= b for a, b in zip(sources, takers, strict=False)):
        better = {max(pair): min(pair) for pair in zip(sources, takers, strict=False) if len({*pair}) == 2}
        refuse("gated_skip", "is not pairs FROM,TO of layers, FROM before TO and each TO once",
               tuple(layer for taker, source in better.items() for layer in (source, taker)))
    if config.gated_skip and config.unet_skips:
        refuse("gated_skip", "does not go with --unet-skips true", ())
    if config.value_residual and 0 in config.attention_free:
        refuse("attention_free", "leaves no values of layer 0 to mix in (--value-residual false does without)",
               tuple(layer for layer in config.attention_free if layer))
    if len(config.backout) > 1:
        refuse("backout", "is more than one layer", config.backout[:1])
    if config.softcap[0] and not config.softcap[1]:
        refuse("softcap", "has a range of 0", Config.softcap)
    for stage in range(config.stages + 1 if config.short_layers else 0):
        if value_at(config.window_short, stage) > value_at(config.window, stage):
            refuse("window_short", f"exceeds --window {spelled(config.window)}", config.window)
    return config


def check_processes(config: Config, world: int) -> None:
    """Raises Refusal, with the nearest valid number, where the processes cannot share the rows of a step."""
    stages = range(max(len(config.tokens_per_step), len(config.row_tokens)))
    sizes = [value_at(config.row_tokens, stage) for stage in stages]
    rows = tuple(value_at(config.tokens_per_step, stage) // sizes[stage] for stage in stages)
    if math.gcd(*rows) % world:
        near = max(n for n in range(1, world + 1) if math.gcd(*rows) % n == 0)
        more = tuple(math.ceil(count / world) * world * size for count, size in zip(rows, sizes, strict=True))
        raise Refusal(f"{world} processes cannot share {spelled(rows)} rows per step; the nearest is "
                      f"--nproc_per_node={near}, or --tokens-per-step {spelled(more)}")


def rows_at_once(config: Config, row_tokens: int, device: torch.device) -> int:
    """The most rows in one forward pass of one process."""
    return max(1, (config.micro_tokens or (65_536 if device.type == "cuda" else 1024)) // row_tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Schedules. In: the step, 0-based. Out: a number. Pure functions; lengths are fractions of the run, so they stretch.


def value_at(values: tuple | list, stage: int):
    """A setting "by stage": one value for each, the last one goes on."""
    return values[min(stage, len(values) - 1)]


def stage_ends(config: Config) -> list[float]:
    """Where the stages, equal parts of the schedule (#46), end, in steps; it may be within one."""
    scheduled = config.steps - round(config.extension * config.steps)
    return [scheduled * part / config.stages for part in range(1, config.stages + 1)]


def stage_borders(config: Config) -> list[int]:
    """The steps where stages 1, 2, ... begin; with the last one the extension does."""
    return [math.ceil(end) for end in stage_ends(config)]


def stage_of(step: int, config: Config) -> int:
    """From 0 on, `config.stages` in the extension; the validation after the last step belongs to that step's."""
    return sum(min(step, config.steps - 1) >= border for border in stage_borders(config))


def tokens_until(step: int, config: Config) -> int:
    """Training tokens of the steps before this one."""
    borders = [0, *stage_borders(config), config.steps]
    return sum(max(0, min(step, end) - begin) * value_at(config.tokens_per_step, stage)
               for stage, (begin, end) in enumerate(zip(borders, borders[1:], strict=False)))


def rate_schedule(step: int, config: Config) -> float:
    """Multiplier of all learning rates: a level by stage, then linear to the floor over the last `cooldown` of the
    schedule. A stage that begins with a step has its level from the one after on, as in the records (#46)."""
    ends = stage_ends(config)
    level, scheduled = value_at(config.rate_levels, sum(step > end for end in ends)), ends[-1]
    length = round(config.cooldown * scheduled)
    left = min(1.0, max(0, scheduled - step) / length) if length else 1.0
    return level * left + config.rate_floor * (1 - left)


def momentum_schedule(step: int, config: Config) -> float:
    """Muon's momentum: rises over the first `momentum_warmup` of the run, falls over the last `momentum_cooldown`."""
    rise, fall = (max(1, round(share * config.steps)) for share in (config.momentum_warmup, config.momentum_cooldown))
    high = min(1.0, step / rise, (config.steps - step) / fall if config.momentum_cooldown else 1.0)
    return config.muon_momentum_start + (config.muon_momentum - config.muon_momentum_start) * high


def windows_at(step: int, config: Config) -> tuple[int, int]:
    """(long, short) attention windows, growing by stage (#29); the validation after the last step sees further."""
    stage, is_last = stage_of(step, config), step == config.steps and config.window_final > 0
    return config.window_final if is_last else value_at(config.window, stage), value_at(config.window_short, stage)


def multi_token_weights(step: int, config: Config) -> list[float]:
    """Weights of the losses of the next token, the one after it, ...: 1, 1/2, 1/4. Each stage predicts one token less
    than the one before, and the last weight falls to zero in the course of it (#53)."""
    stage, ends = stage_of(step, config), stage_ends(config)
    weights = [0.5**ahead for ahead in range(max(1, config.predicted_tokens - stage))]
    if len(weights) > 1 and stage < config.stages:
        weights[-1] *= (ends[stage] - step) / ends[0]
    return weights


def last_tied_step(config: Config) -> int:
    """The last step in which embedding and head are one table, always one where Adam updates it; -1: none (#53)."""
    if config.tied_until in (0, 1):
        return config.steps if config.tied_until else -1
    last = math.ceil(round(config.tied_until * stage_ends(config)[-1], 6))
    return last + (-last - 1) % config.adam_every


def tied_after(step: int, config: Config) -> bool:
    """Whether embedding and head are one table still, after so many updates."""
    return step - 1 <= last_tied_step(config)


def yarn_schedule(stage: int, config: Config) -> tuple[Tensor, float]:
    """Rotary frequencies (turning channels / 2,) float64 in radians per token, and the softmax scale of a stage. YaRN
    (#31): where the window grows from W to W', a frequency that made less than one turn within W is slowed by W / W',
    one of more than 32 turns is kept, those between are blended; the softmax grows sharper."""
    head_width = config.width // config.heads
    turning = 2 * round(config.rotary_share * head_width / 2)
    frequency = config.rotary_base ** (-torch.arange(0, turning, 2, dtype=torch.float64) / max(1, turning))
    scale = config.attention_scale or head_width**-0.5
    for before in range(min(stage, config.yarn)):
        old, new = value_at(config.window, before), value_at(config.window, before + 1)
        kept = ((old * frequency / (2 * math.pi) - 1) / 31).clamp(0, 1)
        frequency = frequency * (old / new + kept * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return frequency, scale


# ----------------------------------------------------------------------------------------------------------------------
# Processes. In: what torchrun put into the environment. Out: this process's rank, the number of processes, its device.


class Processes(NamedTuple):
    rank: int  # of this process; 0 writes the log
    world: int  # how many there are
    device: torch.device  # that this one computes on
    host: dist.ProcessGroup | None = None  # for what processes tell each other beside the GPUs' work

    def synchronize(self) -> None:
        """Wait until the device has done all it was given, so that the host's clock means something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Wait until every process has come here, for an hour at most: one of them may be compiling or writing."""
        if self.world > 1:
            dist.monitored_barrier(self.host, timedelta(hours=1))

    def told(self, value):
        """What process 0 has, on every process. A plain value."""
        return self.gathered(value)[0]

    def gathered(self, value) -> list:
        """What each process has. Plain values."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.host)
        return values

    def must_agree(self, what: str, values: dict, remedy: str) -> None:
        """Raises Refusal, on every process, where one has other values than process 0."""
        first, *others = self.gathered(values)
        for rank, other in enumerate(others, 1):
            if difference := first_difference(first, other):
                name, expected, found = difference
                raise Refusal(f"{what} {name} is {found} in process {rank}, expected {expected} as in process 0; "
                              f"{remedy}")


def first_difference(expected: dict, found: dict) -> tuple | None:
    """The first name whose values differ, with both; a missing one counts as None."""
    return next(((name, expected.get(name), found.get(name)) for name in sorted({*expected, *found}, key=str)
                 if expected.get(name) != found.get(name)), None)


def start_processes(config: Config) -> Processes:
    """Join the process group where torchrun started several. Raises Refusal for a GPU that cannot be used."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cpu")
    if config.device == "cuda" or config.device == "auto" and (torch.cuda.is_available() or driver_gpus()):
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
    else:
        keep_freed_memory()
    if world == 1:
        return Processes(rank, world, device)
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise Refusal(f"WORLD_SIZE is {world}, but {missing[0]} is not set; let torchrun start the processes: "
                      f"torchrun --standalone --nproc_per_node={world} train_gpt2.py")
    on_gpu, patience = device.type == "cuda", timedelta(seconds=config.patience)
    store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=world,
                            timeout=patience + timedelta(minutes=on_gpu),  # for the loop to speak first
                            store=names_of_this_start(store, rank, world, config.patience),
                            device_id=device if on_gpu else None)
    return Processes(rank, world, device, dist.new_group(backend="gloo", timeout=timedelta(hours=1)))


def names_of_this_start(store: dist.Store, rank: int, world: int, patience: int) -> dist.Store:
    """The store that processes find each other by, under a name that process 0 makes up. torchrun keeps one store over
    all its restarts: an address that an earlier start left there leads nowhere, and the run would hang. Each process
    asks with a word of its own, so that no old answer can be taken for one to it. Raises Refusal."""
    name, begin = secrets.token_hex(8), time.monotonic()
    if rank > 0:
        store.set(f"asked by {rank}", name)
        name = store.get(f"answer to {name}").decode()
        store.set(f"{name} is known to {rank}", "")
        return dist.PrefixStore(name, store)
    left = range(1, world)
    while left := [other for other in left if not store.check([f"{name} is known to {other}"])]:
        for other in left:
            if store.check([f"asked by {other}"]):
                store.set(f"answer to {store.get(f'asked by {other}').decode()}", name)
        if time.monotonic() > begin + patience:
            raise Refusal(f"processes {spelled(tuple(left))} of {world} have not come within --patience {patience} s; "
                          "what they said stands above or in their machines' output")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def keep_freed_memory() -> None:
    """Have the C library keep what large tensors free, instead of faulting every page in again at the next step, which
    costs `tiny` a tenth of its time. Without glibc, nothing happens."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        mallopt, trim_threshold, most_mappings = ctypes.CDLL(None).mallopt, -1, -4
        mallopt(most_mappings, 0)
        mallopt(trim_threshold, 2**31 - 1)


def driver_gpus() -> str:
    """What the NVIDIA driver itself lists, whether or not torch can use it; empty where there is none."""
    listed = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    lines = listed.stdout.splitlines() if listed and listed.returncode == 0 else []
    return ", ".join(line.split("(")[0].strip() for line in lines if line.startswith("GPU"))


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of activations, tables and Muon's iterations; of the matrices too where they are split."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    on_gpu = device.type == "cuda"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def float8_head(config: Config, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the head's products are taken in float8 while training. Raises Refusal if asked for in vain."""
    fits = dtype == torch.bfloat16 and config.width % 16 == config.loss_chunk % 16 == 0
    if config.head_dtype == "float8" and not fits:
        raise Refusal("--head-dtype float8 takes --dtype bfloat16, and --width and --loss-chunk in multiples of 16, "
                      f"found {str(dtype)[6:]}, {config.width}, {config.loss_chunk}; or give --head-dtype wide")
    has_it = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return config.head_dtype == "float8" or (config.head_dtype == "auto" and has_it and fits)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Shards to rows. In: files of uint16 tokens. Out: batches of rows on the device. The shards form one stream, and which
# tokens form which row depends on it and the configuration alone, never on the number of processes.

SHARD_MAGIC, SHARD_VERSION, HEADER_WORDS = 20240520, 1, 256
GPT2_VOCABULARY, GPT2_SEPARATOR = 50257, 50256


class Shard(NamedTuple):
    """A checked file: 256 little-endian int32 words (magic, version, tokens, vocabulary, separator), uint16 tokens."""

    path: str
    tokens: int
    vocabulary: int
    separator: int
    stamp: tuple  # of the file as it was checked


def damaged(path: str | Path, problem: str) -> Refusal:
    return Refusal(f"{path} {problem}; fetch or write it again: rm -f {shlex.quote(str(path))} && "
                   f"{shard_command(path)}")


def file_stamp(path: str | Path) -> tuple:
    """Changes when a file is replaced or written to. Raises OSError."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns  # no inode: some network disks make it up anew


def open_shard(path: str | Path) -> Shard:
    """Check the header against the file. Raises Refusal naming the file and what is wrong with it."""
    try:
        stamp, header = file_stamp(path), np.fromfile(path, "<i4", HEADER_WORDS)
        size = stamp[0]
    except OSError as error:
        raise damaged(path, f"cannot be read as a shard: {error.strerror}") from None
    if len(header) < HEADER_WORDS:
        raise damaged(path, f"has {size} bytes, less than a shard's header of {4 * HEADER_WORDS}")
    magic, version, count, vocabulary, separator = (int(word) for word in header[:5])
    if magic != SHARD_MAGIC:
        problem = f"is no token shard: its first word is {magic}, expected {SHARD_MAGIC}"
        if str(path).endswith(".bin"):
            raise damaged(path, problem)
        raise Refusal(f"{path} {problem}; make shards of text: python data/text.py {path} --out FOLDER")
    if version != SHARD_VERSION:
        raise damaged(path, f"has shard version {version}, expected {SHARD_VERSION}")
    expected = 4 * HEADER_WORDS + 2 * count
    if count <= 0 or size != expected:
        raise damaged(path, f"promises {count} tokens but holds {(size - 4 * HEADER_WORDS) // 2}: "
                            f"{'truncated' if size < expected else 'damaged'}")
    vocabulary = vocabulary or GPT2_VOCABULARY  # 0 means GPT-2's
    separator = separator or (GPT2_SEPARATOR if vocabulary > GPT2_SEPARATOR else 0)
    if not 0 < vocabulary <= 65_536 or not 0 <= separator < vocabulary:
        raise damaged(path, f"states a vocabulary of {vocabulary} with separator {separator}, expected at most 65536 "
                            "and a separator within it")
    return Shard(str(path), count, vocabulary, separator, stamp)


def shard_command(pattern: str | Path, shards: int = 10) -> str:
    """The command that makes the shards of a glob."""
    if "fineweb" in str(pattern):
        return f"python data/fineweb.py {shards}"
    folder = Path(pattern).parent
    return "python data/text.py" + f" TEXT... --out {folder}" * (folder != Path("data/text"))


def read_tokens(shard: Shard, start: int, count: int) -> np.ndarray:
    """(count,) uint16 tokens from `start` on. Raises Refusal if the file has changed or holds an impossible token."""
    if not 0 <= start <= start + count <= shard.tokens:
        raise Refusal(f"{shard.path} has {shard.tokens} tokens; {count} from {start} on are not among them")
    try:
        tokens = np.fromfile(shard.path, "<u2", count, offset=4 * HEADER_WORDS + 2 * start)
        changed = shard.stamp != file_stamp(shard.path)
    except OSError as error:
        raise damaged(shard.path, f"can no longer be read: {error.strerror}") from None
    if len(tokens) < count:
        raise damaged(shard.path, f"ends at token {start + len(tokens)} of {shard.tokens}: it was cut after the start")
    if changed:
        raise damaged(shard.path, "was replaced or written to after the start")
    if count and int(tokens.max()) >= shard.vocabulary:
        raise damaged(shard.path, f"holds token {tokens.max()} at position {start + int(tokens.argmax())}, beyond its "
                                  f"vocabulary of {shard.vocabulary}")
    return tokens


class TokenStream:
    """The shards of a glob in name order as one sequence of `tokens` tokens; a read beyond its end starts over."""

    def __init__(self, pattern: str):
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

    @functools.cached_property
    def fingerprint(self) -> dict[str, list[int]]:
        """By the name of each shard, what its header says and a checksum of 65,536 tokens: to know them again."""
        return {f"{index}: {Path(shard.path).name}": [
                    *shard[1:4], zlib.crc32(read_tokens(shard, 0, min(shard.tokens, 65_536)))]
                for index, shard in enumerate(self.shards)}

    def place(self, position: int) -> tuple[int, Shard, int]:
        """Number and shard of a position of the stream, and the position within it."""
        position %= self.tokens
        index = int(np.searchsorted(self.first, position, side="right")) - 1
        return index, self.shards[index], position - int(self.first[index])

    def read(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(count,) uint16 tokens from a position of the stream on; (count,) bool, true where a document starts."""
        tokens, starts, filled = np.empty(count, np.uint16), np.empty(count, bool), 0
        while filled < count:
            index, shard, inside = self.place(position + filled)
            part = slice(filled, min(count, filled + shard.tokens - inside))
            tokens[part] = read_tokens(shard, inside, part.stop - part.start)
            np.equal(tokens[part], self.separator, out=starts[part])
            if inside == 0 and self.opens_document[index]:
                starts[filled] = True
            filled = part.stop
        return tokens, starts


class Batch(NamedTuple):
    inputs: Tensor  # (R, T) int32
    targets: Tensor  # (R, T) int64: the next token; -1: none
    starts: Tensor  # (R, T) bool: a document begins
    places: tuple[int, ...] = ()  # where in the stream the rows begin
    following: "Cursor | None" = None  # where those of the next step do


def read_rows(stream: TokenStream, position: int, rows: int, row_tokens: int, end: int) -> Batch:
    """Rows of the stream as it comes, for validation, in host memory; inputs from position `end` on have no target."""
    count = max(0, min(rows * row_tokens, end - position))
    tokens, starts = stream.read(position, count + 1 if count else 0)
    inputs, targets = np.zeros(rows * row_tokens, np.int32), np.full(rows * row_tokens, -1, np.int64)
    begins = np.zeros(rows * row_tokens, bool)
    inputs[:count], targets[:count], begins[:count] = tokens[:count], tokens[1:], starts[:count]
    return Batch(*(torch.from_numpy(array).view(rows, row_tokens) for array in (inputs, targets, begins)))


def training_row(stream: TokenStream, position: int, row_tokens: int, config: Config) -> tuple:
    """The row that begins at `position`: (T + 1,) uint16 tokens, inputs and the last target; (T + 1,) bool, where a
    document starts; and the position of the next row. Every row begins with a document, none longer than
    document_tokens (#29). What is cut off, by that or by the row's end, is dropped, or is the next document."""
    count, most = row_tokens + 1, config.document_tokens or row_tokens + 1
    span = count if config.long_documents == "continue" else count + count // 2
    while True:  # until what was read holds a row and the start of the document after it
        tokens, starts = stream.read(position, span)
        place = np.arange(span)
        inside = place - np.maximum.accumulate(place * starts)  # each token's place in its document
        if config.long_documents == "continue":
            return tokens, starts | (inside % most == 0), position + row_tokens  # the last target is the next's input
        kept = np.flatnonzero(inside < most)[:count]
        following = np.flatnonzero(starts[kept[-1] + 1:])  # documents after the one that fills the row
        if len(kept) == count and len(following):
            return tokens[kept], inside[kept] == 0, position + int(kept[-1] + 1 + following[0])
        span *= 2


def shuffled_rows(stream: TokenStream, config: Config, row_tokens: int, deal: int) -> list[int]:
    """Where each whole row of the stream begins, in an order that the seed and the number of the deal decide."""
    positions = [0]
    while positions[-1] < stream.tokens:
        positions.append(training_row(stream, positions[-1], row_tokens, config)[-1])
    ends_whole = config.long_documents == "drop" and positions[-1] == stream.tokens
    del positions[-1 if ends_whole else -2:]  # the last row begins, or runs on, beyond the end
    return np.random.default_rng((config.seed, deal)).permutation(positions).tolist()


class Cursor(NamedTuple):
    """Where the next row comes from: with the seed, all that a run has to remember of its data."""

    position: int = 0  # of the stream
    deals: int = 0  # shuffled, how often all rows were dealt out
    left: int = 0  # and how many of the last deal are left


def step_rows(stream: TokenStream, config: Config, first: int = 0,
              cursor: Cursor = Cursor()) -> Iterator[tuple[list, Cursor]]:
    """Yield the rows of step `first`, each with the position where it begins, and the cursor after them; then those of
    the next step, and so on. Rows follow each other. Shuffled, all rows of the stream are dealt out, then again."""
    (position, deals, left), size = cursor, value_at(config.row_tokens, stage_of(max(0, first - 1), config))
    dealt = shuffled_rows(stream, config, size, deals - 1)[:left] if left and config.shuffle else []
    for step in range(first, config.steps):
        stage, rows = stage_of(step, config), []
        if value_at(config.row_tokens, stage) != size:
            dealt, size = [], value_at(config.row_tokens, stage)
        for _ in range(value_at(config.tokens_per_step, stage) // size):
            if config.shuffle and not dealt:
                dealt, deals = shuffled_rows(stream, config, size, deals), deals + 1
            place = dealt.pop() if dealt else position
            tokens, starts, position = training_row(stream, place, size, config)
            rows.append((tokens, starts, place))
        yield rows, Cursor(position, deals, len(dealt))


def step_batches(stream: TokenStream, config: Config, processes: Processes, first: int = 0,
                 cursor: Cursor = Cursor()) -> Iterator[Batch]:
    """Yield this process's share of each step's rows, in host memory: consecutive ones, as many as the others have."""
    for rows, following in step_rows(stream, config, first, cursor):
        share = len(rows) // processes.world
        tokens, starts, places = zip(*rows[processes.rank * share:(processes.rank + 1) * share], strict=True)
        tokens, starts = torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(starts))
        yield Batch(tokens[:, :-1].int(), tokens[:, 1:].long(), starts[:, :-1], places, following)


def tokens_needed(stream: TokenStream, config: Config) -> int:
    """How far a run reads into the stream. Where documents are cut short, that is found by packing all its rows; beyond
    four passes over the stream, by packing a part of them."""
    inputs = tokens_until(config.steps, config)
    if config.long_documents == "continue":
        return inputs + 1  # the last target of all
    parts = 1 + inputs // (4 * stream.tokens)
    shorter = dataclasses.replace(config, shuffle=False, steps=max(1, config.steps // parts))
    return parts * deque(step_rows(stream, shorter), maxlen=1).pop()[1].position


def prefetched(batches: Iterator[Batch], processes: Processes) -> Iterator[Batch]:
    """Yield the batches on the device; the next one is read and copied while this one is in use."""
    copies = torch.cuda.Stream(processes.device) if processes.device.type == "cuda" else None

    def fetch() -> Batch | None:
        batch = next(batches, None)
        if copies is None or batch is None:
            return batch
        torch.cuda.set_device(processes.device)  # a new thread starts on GPU 0, whatever its process uses
        with torch.cuda.stream(copies):
            batch = Batch(*(part.pin_memory().to(processes.device, non_blocking=True) for part in batch[:3]),
                          *batch[3:])
        copies.synchronize()
        return batch

    with ThreadPoolExecutor(max_workers=1) as reader:
        upcoming = reader.submit(fetch)
        while (batch := upcoming.result()) is not None:
            upcoming = reader.submit(fetch)
            for part in batch[:3] if copies else ():  # not to be handed to a later copy while this step still reads it
                part.record_stream(torch.cuda.current_stream(processes.device))
            yield batch


# ----------------------------------------------------------------------------------------------------------------------
# Rows to attention masks. In: where documents start, (R, T) bool, and the window. Out: what each query may see. Causal,
# same document, sliding window: the keys of query q are always one interval [first_key[q], q], and first_key never
# decreases along a row. So the mask is two comparisons, and its blocks are intervals too: no T x T work anywhere.

MASK_BLOCK = 128


def first_visible_key(starts: Tensor, window: int) -> Tensor:
    """(R, T) bool, tokens -> (R, T) int32: the first key each query sees, at most `window` before itself."""
    position = torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device)
    document = (position * starts).cummax(dim=1).values
    return torch.maximum(document, position - min(window, len(position)))


def interval_rule(first_key: Tensor):
    """The mask itself, as FlexAttention wants it: (row, head, query, key) -> may the query see the key?"""
    return lambda row, head, query, key: (first_key[row, query] <= key) & (key <= query)


def block_mask(first_key: Tensor) -> BlockMask:
    """(R, T) int32 -> BlockMask of T / 128 squared blocks, all on the device without waiting for it. Query block i
    visits key blocks [reach[i], i]: those in [inside[i], i) lie wholly within the mask, the diagonal and those left of
    inside[i] are tested token by token. As reach and inside never decrease, the query blocks of a key block, which the
    backward pass visits, are intervals as well and their ends are found by bisection."""
    rows, tokens = first_key.shape
    block = torch.arange(tokens // MASK_BLOCK, dtype=torch.int32, device=first_key.device)
    reach = first_key[:, ::MASK_BLOCK] // MASK_BLOCK  # (R, T / 128), as everything below
    inside = torch.minimum((first_key[:, MASK_BLOCK - 1::MASK_BLOCK] + (MASK_BLOCK - 1)) // MASK_BLOCK, block)
    key = block.expand(rows, -1).contiguous()
    full_end = torch.searchsorted(inside.contiguous(), key, right=True, out_int32=True)
    partial_end = torch.searchsorted(reach.contiguous(), key, right=True, out_int32=True)

    def listed(begin: Tensor, end: Tensor, diagonal: int) -> tuple[Tensor, Tensor]:
        """Intervals of blocks -> counts (R, 1, N) and lists (R, 1, N, N), with the block itself in front or not."""
        numbers = (begin[..., None] - diagonal + block).clamp_(max=len(block) - 1)
        if diagonal:
            numbers[..., 0] = key
        return (end - begin + diagonal)[:, None], numbers[:, None]

    return BlockMask((tokens, tokens), *listed(reach, inside, 1), *listed(inside, key, 0),
                     *listed(full_end, partial_end, 1), *listed(key + 1, full_end, 0),
                     BLOCK_SIZE=(MASK_BLOCK, MASK_BLOCK), mask_mod=interval_rule(first_key))


class Span(NamedTuple):
    queries: slice  # a block of them
    keys: slice  # that any of them sees
    visible: Tensor  # (R, 1, queries, keys) bool: which sees which


def span_mask(first_key: Tensor, block: int = 2 * MASK_BLOCK) -> list[Span]:
    """(R, T) int32 -> the same mask for scaled_dot_product_attention, where FlexAttention has no backward (CPU)."""
    row, position = (torch.arange(size, device=first_key.device) for size in first_key.shape)
    spans = []
    for begin in range(0, len(position), block):
        queries = slice(begin, min(len(position), begin + block))
        keys = slice(int(first_key[:, begin].min()), queries.stop)
        visible = interval_rule(first_key)(row[:, None, None, None], None, position[queries, None], position[keys])
        spans.append(Span(queries, keys, visible))
    return spans


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | list[Span]) -> Tensor:
    """Softmax attention, all (R, H, T, K). The query carries the scale, a tensor: it may change without a new graph."""
    if isinstance(mask, BlockMask):
        return flex_attention(query, key, value, block_mask=mask, scale=1.0)
    return torch.cat([F.scaled_dot_product_attention(query[:, :, span.queries], key[:, :, span.keys],
                                                     value[:, :, span.keys], span.visible, scale=1.0)
                      for span in mask], dim=2)


# ----------------------------------------------------------------------------------------------------------------------
# Model. In: a batch of rows and their masks. Out: the last hidden state (R, T, D), which the loss takes to logits.


def rms_norm(x: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) over the last axis, without gain. The epsilon is explicit because torch's default
    for bf16 changed from 2^-7 to 2^-23 in January 2025, and the five-minute run had the former."""
    return F.rms_norm(x, x.shape[-1:], eps=epsilon)


def gate(x: Tensor, weight: Tensor) -> Tensor:
    """(..., D) and (gates, channels) or (channels,) -> (..., gates) or (...,), in (0, 1): the gate sees the first
    channels only, weights of zero give 1/2 (#28)."""
    return torch.sigmoid(x[..., :weight.shape[-1]] @ weight.to(x.dtype).movedim(-1, 0))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer): of the first 2 n channels of (R, T, heads, K), j and j + n turn together by
    their position's angle; cosines and sines (T, heads or 1, n). The others stay still (half-truncated, #17)."""
    turning = cosine.shape[-1]
    low, high, still = x.split((turning, turning, x.shape[-1] - 2 * turning), dim=-1)
    return torch.cat((low * cosine + high * sine, high * cosine - low * sine, still), dim=-1)


def table_of(table: Tensor, tokens: int, heads: int, paired: bool) -> Tensor:
    """(2 T, n) cosines or sines of all positions -> what `rotate` takes: those of position t, (T, 1, n); for paired
    heads, of which each token has two positions, those of 2 t + h mod 2 for head h, (T, heads, n)."""
    return table[:2 * tokens].view(tokens, 2, -1).repeat(1, heads // 2, 1) if paired else table[:tokens, None]


def previous(x: Tensor) -> Tensor:
    """(R, T, ...) -> what stands one position before; position 0 keeps its own."""
    return torch.cat((x[:, :1], x[:, :-1]), dim=1)


def offset_keys(key: Tensor, turning: int, alone: Tensor) -> Tensor:
    """Partial key offset (#49): the still channels of a key (R, T, H, K) come from the token before, so that one layer
    can find what followed an earlier occurrence of a token (induction). `alone`: (R, T) bool, which keep theirs."""
    moving, still = key.split((turning, key.shape[-1] - turning), dim=-1)
    return torch.cat((moving, torch.where(alone[..., None, None], still, previous(still))), dim=-1)


def smear(embedded: Tensor, weight: Tensor, gate_weight: Tensor, alone: Tensor) -> Tensor:
    """Smear (#34): each (R, T, D) embedding takes up a gated share of the one before; tokens that are `alone`, none."""
    share = weight * gate(embedded, gate_weight).masked_fill(alone, 0)
    return embedded + share.to(embedded.dtype)[..., None] * previous(embedded)


def bigram_rows(tokens: Tensor, alone: Tensor, rows: int) -> Tensor:
    """Bigram hash (#62): (R, T) int32 tokens -> the row of the table that each one shares with its predecessor; the
    last of the `rows` for tokens that are `alone`. Products wrap around in int32; the modulo is never negative."""
    before = previous(torch.where(alone, rows - 1, tokens).int())
    return torch.where(alone, rows - 1, ((36_313 * tokens) ^ (27_191 * before)) % (rows - 1))


class Layer(NamedTuple):
    """What one layer has."""

    attends: bool
    short: bool  # it and `paired` choose the mask
    paired: bool
    offset: bool
    table: int | None  # of value embeddings
    mixes: bool  # layer 0's values into its own


def layer_plan(config: Config) -> list[Layer]:
    """The layers in order. Value tables are dealt in turn: with three, layers 0, 1, 8, 9, 10 take 0, 1, 2, 0, 1."""
    tables = {layer: place % config.value_tables for place, layer in enumerate(sorted(set(config.value_layers)))}
    return [Layer(i not in config.attention_free, i in config.short_layers, i in config.paired_layers,
                  config.key_offset and i not in config.short_layers + config.paired_layers, tables.get(i),
                  config.value_residual and i > 0) for i in range(config.layers)]


class Shared(NamedTuple):
    """What all layers of a pass see."""

    x0: Tensor  # (R, T, D) the embedding
    bigram: Tensor | None  # (R, T, D) that of token pairs
    second: Tensor | None  # (R, T, D) another one of the token
    alone: Tensor  # (R, T) bool: the token before may not be looked at
    cosine: Tensor  # (2 T, n), as are sines: all positions
    sine: Tensor
    scale: Tensor  # () of the softmax


def weight_of(*shape: int, dtype: torch.dtype, first: float = 0.0, used: bool = True) -> nn.Parameter | None:
    """A parameter that starts with one value throughout; None where it is off."""
    return nn.Parameter(torch.full(shape, first, dtype=dtype)) if used else None


class Block(nn.Module):
    """Attention and MLP. Has no layer number, so that layers share graphs; weights of what is off are None."""

    def __init__(self, config: Config, layer: Layer, dtype: torch.dtype):
        super().__init__()
        self.heads, self.qk_norm, self.epsilon = config.heads, config.qk_norm, config.rms_epsilon
        self.attends, self.paired, self.offset = layer.attends, layer.paired, layer.offset
        width, hidden, wide = config.width, config.mlp_ratio * config.width, at_least_float32(dtype)
        matrix = dtype if config.split_precision else wide
        weight = functools.partial(weight_of, dtype=wide)
        self.attention = weight(4, width, width, dtype=matrix, used=layer.attends)  # query, key, value, output
        self.mlp = weight(2, hidden, width, dtype=matrix)  # up, down transposed
        self.residual = weight(first=config.residual_init, used=config.x0_shortcut)
        self.x0 = weight(used=config.x0_shortcut)
        self.bigram = weight(first=0.1, used=config.bigram > 0)
        self.second = weight(used=config.second_embedding)
        self.into = weight(first=0.5, used=layer.attends and config.attention_mix)
        self.out = weight(first=1.0, used=layer.attends and config.attention_mix)
        self.value_mix = weight(first=0.5, used=layer.mixes)
        channels = min(config.gate_channels, width)
        self.attention_gate = weight(config.heads, channels, used=layer.attends and config.attention_gates)
        self.value_gate = weight(config.heads, channels, used=layer.table is not None and config.value_gates)

    def forward(self, x: Tensor, shared: Shared, mask, skip: Tensor | None, first_value: Tensor | None,
                embedded: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """All (R, T, D) but layer 0's values (R, T, H, K), which that layer itself returns beside the new stream."""
        value, x = None, x if skip is None else x + skip
        if self.residual is not None:
            x = self.residual * x + self.x0 * shared.x0
        if self.bigram is not None:
            x = x + self.bigram * shared.bigram
        if self.second is not None:
            x = x + self.second * shared.second
        if self.attends:
            attended, value = self.attend(rms_norm(x, self.epsilon), shared, mask, first_value, embedded)
            x = x + attended
        up, down = self.mlp.to(x.dtype).unbind(0)
        hidden = F.linear(rms_norm(x, self.epsilon), up).relu().square()  # ReLU^2 (Primer): sparse and cheap
        return x + hidden @ down, value if first_value is None else None

    def attend(self, x: Tensor, shared: Shared, mask, first_value, embedded) -> tuple[Tensor, Tensor]:
        """What attention adds to the stream, and this layer's own values."""
        rows, tokens, _ = x.shape
        into, out = self.attention.to(x.dtype).split((3, 1))
        if self.into is not None:  # on the weights, where it costs least (#47, #48)
            into, out = self.into * into, self.out * out
        heads = F.linear(x, into.flatten(0, 1)).view(rows, tokens, 3 * self.heads, -1)
        query, key, own = heads.chunk(3, dim=2)  # (R, T, H, K)
        if self.qk_norm:
            query, key = rms_norm(query, self.epsilon), rms_norm(key, self.epsilon)
        turns = [table_of(table, tokens, self.heads, self.paired) for table in (shared.cosine, shared.sine)]
        query, key, value = rotate(query, *turns) * shared.scale, rotate(key, *turns), own
        if first_value is not None:
            value = torch.lerp(value, first_value, self.value_mix.to(value.dtype))
        if embedded is not None:
            share = 2 * gate(x, self.value_gate)[..., None] if self.value_gate is not None else 1  # #55
            value = value + share * embedded.view(value.shape)
        if self.offset:
            key = offset_keys(key, 2 * shared.cosine.shape[-1], shared.alone)
        if self.paired:  # (R, 2 T, H / 2, K): a token's heads h and h + H / 2 are two positions of one head (#58)
            query, key, value = (x.reshape(rows, 2 * tokens, self.heads // 2, -1) for x in (query, key, value))
        seen = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
        seen = seen.transpose(1, 2).reshape(rows, tokens, self.heads, -1)  # (R, T, H, K) again
        if self.attention_gate is not None:
            seen = seen * gate(x, self.attention_gate)[..., None]
        return F.linear(seen.flatten(2), out[0]), own


def run_block(block: Block, *arguments) -> tuple[Tensor, Tensor | None]:
    """What is compiled: the block is an argument, so its weights are inputs of the graph and not part of it."""
    return block(*arguments)


class GPT(nn.Module):
    """The language model. Parameters: embedding and head (V, D), only the head if they are never to part; per block
    12 D^2 (at mlp_ratio 4); tables of value embeddings, of bigrams, of a second embedding; gates and a few scalars.
    What changes with the stage, rotary tables and softmax scale, are buffers that `enter_stage` fills; `tied` says that
    embedding and head are one table for now."""

    def __init__(self, config: Config, vocabulary: int, dtype: torch.dtype):
        """Weights are drawn on the CPU from config.seed, so that every process and device starts from the same ones."""
        super().__init__()
        self.config, self.vocabulary, self.plan = config, vocabulary, layer_plan(config)
        self.compiled, self.run_block, self.loss_of_chunk = False, run_block, loss_of_chunk
        self.dtype, self.float8, self.stage, self.tied = dtype, False, -1, last_tied_step(config) >= 0
        padded = -(-vocabulary // 64) * 64  # matrix units like round sizes; the extra columns are never targets
        wide, width = at_least_float32(dtype), config.width
        draw = torch.Generator().manual_seed(config.seed)
        table = torch.randn(padded, width, generator=draw) * (config.tied_init if self.tied else 1)
        head, one_table = table if self.tied else torch.zeros_like(table), config.tied_until == 1
        self.embedding = None if one_table else nn.Parameter(table.to(dtype))
        becomes_two = self.tied and not one_table  # then the head has the type of the embedding that copies it (#51)
        self.head = nn.Parameter(head.to(dtype if becomes_two else wide, copy=True))
        self.blocks = nn.ModuleList(Block(config, layer, dtype) for layer in self.plan)
        for block in self.blocks:  # what adds to the stream starts at zero
            drawn = [(block.attention[:3], config.attention_init)] if block.attends else []
            for matrices, spread in [*drawn, (block.mlp[0], config.mlp_init)]:
                bound = spread * (3 / width) ** 0.5
                matrices.data.copy_(torch.empty(matrices.shape).uniform_(-bound, bound, generator=draw))
        weight = functools.partial(weight_of, dtype=wide)
        tables = min(config.value_tables, len(set(config.value_layers)))
        self.value_tables = nn.ParameterList(weight(padded, width, dtype=dtype) for _ in range(tables))
        self.bigram_table = weight(config.bigram * padded, width, dtype=dtype, used=config.bigram > 0)
        if config.second_embedding:
            self.second_table = nn.Parameter(torch.randn(padded, width, generator=draw).to(dtype))
        channels = min(config.gate_channels, width)
        self.smear_mix, self.smear_gate = weight(used=config.smear), weight(channels, used=config.smear)
        # By layer, the one whose output it receives: the second half that of the first, mirrored (U-net, #11), or some
        # of them through a gate (#45, #55).
        self.skips = dict(zip(config.gated_skip[1::2], config.gated_skip[::2], strict=True))
        if config.unet_skips:
            self.skips = {config.layers - 1 - i: i for i in reversed(range(config.layers // 2))}
        self.skip_mix = weight(len(self.skips), first=-1.5 if config.gated_skip else 1.0, used=bool(self.skips))
        self.skip_gate = weight(len(self.skips), channels, used=bool(config.gated_skip))
        self.backout_mix = weight(first=0.5, used=bool(config.backout))
        positions = max(*config.row_tokens, config.val_row_tokens) * (2 if config.paired_layers else 1)
        turning = len(yarn_schedule(0, config)[0])
        for name, shape, kind in (("cosine", (positions, turning), dtype), ("sine", (positions, turning), dtype),
                                  ("scale", (), wide)):
            self.register_buffer(name, torch.empty(shape, dtype=kind), persistent=False)
        self.enter_stage(0)

    def enter_stage(self, stage: int) -> None:
        """Rotary tables and softmax scale of a stage; positions count from the start of the row."""
        if stage != self.stage:
            (frequencies, scale), self.stage = yarn_schedule(stage, self.config), stage
            position = torch.arange(len(self.cosine), dtype=torch.float64, device=self.cosine.device)
            angle = torch.outer(position, frequencies.to(position.device))
            self.cosine.copy_(angle.cos())
            self.sine.copy_(angle.sin())
            self.scale.fill_(scale)

    def compile_parts(self) -> None:
        """Compile per block, not the whole model: layers of one kind share a graph, and each gradient is there, and its
        hook called, as soon as its layer is done."""
        self.compiled = True
        limits = torch._dynamo.config  # kinds of layers, times stages, with and without gradients
        limits.recompile_limit = limits.accumulated_recompile_limit = 4096
        self.run_block = torch.compile(run_block, dynamic=False, fullgraph=True)
        self.loss_of_chunk = torch.compile(loss_of_chunk, dynamic=False, fullgraph=True)

    def forward(self, inputs: Tensor, starts: Tensor, masks: dict) -> Tensor:
        """(R, T) int32, (R, T) bool and `attention_masks` of these rows -> (R, T, D), normed, ready for the head."""
        config, epsilon = self.config, self.config.rms_epsilon
        alone = torch.zeros_like(starts) if config.cross_document else starts.clone()
        alone[:, 0] = True
        embedded = F.embedding(inputs, self.head if self.tied else self.embedding).to(self.dtype)
        bigram = second = None
        if config.smear:
            embedded = smear(embedded, self.smear_mix, self.smear_gate, alone)
        if config.bigram:
            bigram = F.embedding(bigram_rows(inputs, alone, len(self.bigram_table)), self.bigram_table)
        if config.second_embedding:
            second = rms_norm(F.embedding(inputs, self.second_table), epsilon)
        x = x0 = rms_norm(embedded, epsilon) if config.embedding_norm else embedded
        shared = Shared(x0, bigram, second, alone, self.cosine, self.sine, self.scale)
        outputs, first_value, kept = {}, None, {*self.skips.values(), *config.backout}
        for i, (block, layer) in enumerate(zip(self.blocks, self.plan, strict=True)):
            skip, values = self.skip(i, x0, outputs), None
            if layer.table is not None:
                values = F.embedding(inputs, self.value_tables[layer.table])
            run = self.run_block
            if config.recompute and torch.is_grad_enabled():
                run = functools.partial(recomputed, run, use_reentrant=False, preserve_rng_state=False)
            x, value = run(block, x, shared, masks.get((layer.short, layer.paired)), skip, first_value, values)
            if i in kept:
                outputs[i] = x
            if config.value_residual and i == 0:
                first_value = value
        for source in config.backout:
            x = x - self.backout_mix * outputs[source]
        return rms_norm(x, epsilon)

    def skip(self, layer: int, x0: Tensor, outputs: dict[int, Tensor]) -> Tensor | None:
        """What a layer takes over from an earlier one, (R, T, D), if anything."""
        if layer not in self.skips:
            return None
        place = list(self.skips).index(layer)
        share = self.skip_mix[place]
        if self.config.gated_skip:
            share = (share.sigmoid() * 2 * gate(x0, self.skip_gate[place])).to(x0.dtype)[..., None]
        return share * outputs[self.skips[layer]]

    def loss(self, batch: Batch, masks: dict, weights: Floats | list[float] = (1.0,)) -> tuple[Tensor, Tensor]:
        """Sums, not means, of cross-entropies in nats, 0-dimensional, at least float32: of the next `len(weights)`
        tokens of every token, weighted, for training; of the next token alone, without a gradient, to report."""
        hidden, ahead = self(batch.inputs, batch.starts, masks).flatten(0, 1), range(len(weights))
        targets = torch.stack([F.pad(batch.targets[:, k:], (0, k), value=-1) for k in ahead], dim=-1).flatten(0, 1)
        weights = [torch.tensor(weight, dtype=at_least_float32(hidden.dtype)) for weight in weights]
        return ChunkedLoss.apply(hidden, self.head, targets, weights, self, torch.is_grad_enabled())

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., vocabulary), capped, at least float32; the padding columns are left out."""
        raw = F.linear(hidden, self.head[:self.vocabulary].to(hidden.dtype)).to(at_least_float32(hidden.dtype))
        return softcap(raw, self.config.softcap)[0]


def attention_masks(model: GPT, starts: Tensor, windows: tuple[int, int]) -> dict[tuple[bool, bool], list]:
    """(R, T) bool and the (long, short) windows -> a mask per kind of layer, by (is short, is paired): blocks where
    attention is compiled, spans elsewhere. Windows count positions, of which a token has two in paired layers."""
    starts = starts & model.config.document_mask
    masks, doubled = {}, torch.stack((starts, torch.zeros_like(starts)), dim=-1).flatten(1)
    for short, paired in {(layer.short, layer.paired) for layer in model.plan if layer.attends}:
        first_key = first_visible_key(doubled if paired else starts, windows[short])
        masks[short, paired] = block_mask(first_key) if model.compiled else span_mask(first_key)
    return masks


# ----------------------------------------------------------------------------------------------------------------------
# Loss. In: hidden states (N, D), head (V, D), targets (N, k). Out: the summed cross-entropy and, while the logits of a
# chunk are at hand, both gradients: full logits (6.6 GB at 65,536 tokens) never exist and nothing is computed twice.

# What is divided by before a cast to float8, so that the largest values met (100, 1.6, 96) reach its end (#51, #55).
HIDDEN_UNIT, HEAD_UNIT, SLOPE_UNIT = 100 / 448, 1.6 / 448, 0.75 / 448


def float8(x: Tensor, unit: float, kind: torch.dtype) -> Tensor:
    """x / unit, clipped: beyond its range a cast gives the largest value, infinity or NaN, as the kind has it."""
    most = torch.finfo(kind).max
    return (x / unit).clamp(-most, most).to(kind)


def scaled_product(a: Tensor, b: Tensor, unit: float, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """(m, k) x (n, k)^T of float8 -> (m, n), times `unit`. Both operands are contiguous, as the hardware wants them."""
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b.mT, scale_a=one * unit, scale_b=one, out_dtype=dtype, use_fast_accum=fast)


def softcap(raw: Tensor, cap: Floats) -> tuple[Tensor, Tensor | float]:
    """Logits h tanh((raw + shift) / range) and their slope; h = 0: as they are. The cap keeps the model from being too
    sure (Gemma 2, #18), the shift leaves room for unlikely tokens: (11.5, 15, 5) is #54's 23 sigmoid((raw + 5) / 7.5)
    less 11.5, which no softmax sees."""
    height, extent, shift = cap
    if not height:
        return raw, 1.0
    squashed = torch.tanh((raw + shift) / extent)
    return height * squashed, height / extent * (1 - squashed.square())


def loss_of_chunk(hidden: Tensor, head: Tensor, turned_head: Tensor | None, targets: Tensor, weights: list[Tensor],
                  cap: Floats, with_gradient: bool):
    """(n, D), (V, D), (n, k) -> (weighted loss, that of the next token alone); with_gradient also the gradients of the
    former, (n, D) and (V, D). A float8 head comes with its transpose (D, V), and all three products are in float8."""
    narrow, wide = hidden.dtype, at_least_float32(hidden.dtype)
    if turned_head is not None:
        hidden = float8(hidden, HIDDEN_UNIT, torch.float8_e4m3fn)
        raw = scaled_product(hidden, head, HIDDEN_UNIT * HEAD_UNIT, narrow, fast=True)  # (n, V)
    else:
        raw = hidden @ head.mT
    logits, bend = softcap(raw.to(wide), cap)
    normaliser = logits.logsumexp(-1, keepdim=True)
    chosen = softcap(raw.gather(1, targets.clamp_min(0)).to(wide), cap)[0]
    losses = ((normaliser - chosen) * (targets >= 0)).sum(0)
    loss = sum(weight * losses[k] for k, weight in enumerate(weights))
    if not with_gradient:
        return loss, losses[0], None, None
    column = torch.arange(head.shape[0], device=targets.device)
    counted = sum(weight * (targets[:, k:k + 1] >= 0) for k, weight in enumerate(weights))
    wanted = sum(weight * (column == targets[:, k:k + 1]) for k, weight in enumerate(weights))
    slope = ((logits - normaliser).exp() * counted - wanted) * bend
    if turned_head is not None:
        slope = float8(slope, SLOPE_UNIT, torch.float8_e5m2)
        return (loss, losses[0], scaled_product(slope, turned_head, SLOPE_UNIT * HEAD_UNIT, narrow),
                scaled_product(slope.mT.contiguous(), hidden.mT.contiguous(), SLOPE_UNIT * HIDDEN_UNIT, wide))
    slope = slope.to(narrow)
    return loss, losses[0], slope @ head, slope.mT @ hidden


class ChunkedLoss(torch.autograd.Function):
    """Sums of cross-entropies over chunks of config.loss_chunk tokens; targets of -1 count nothing."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, weights: list[Tensor], model: GPT,
                with_gradient: bool) -> tuple[Tensor, Tensor]:
        config, narrow_head, turned_head = model.config, head.to(hidden.dtype), None
        if model.float8 and with_gradient:
            narrow_head = float8(head, HEAD_UNIT, torch.float8_e4m3fn)
            turned_head = narrow_head.mT.contiguous()
        wide = at_least_float32(hidden.dtype)
        total, next_token = torch.zeros((2,), dtype=wide, device=hidden.device)
        hidden_slopes, head_slope = [], torch.zeros_like(head, dtype=wide) if with_gradient else None
        for chunk, wanted in zip(hidden.split(config.loss_chunk), targets.split(config.loss_chunk), strict=True):
            loss, next_loss, hidden_part, head_part = model.loss_of_chunk(
                chunk, narrow_head, turned_head, wanted, weights, config.softcap, with_gradient)
            total += loss
            next_token += next_loss
            if with_gradient:
                hidden_slopes.append(hidden_part)
                head_slope += head_part
        if with_gradient:
            ctx.save_for_backward(torch.cat(hidden_slopes), head_slope.to(head.dtype))
        ctx.mark_non_differentiable(next_token)
        return total, next_token

    @staticmethod
    def backward(ctx, slope: Tensor, _):
        hidden_slope, head_slope = ctx.saved_tensors
        return hidden_slope * slope, head_slope * slope, None, None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers. In: gradients of this process's rows. Out: updated parameters, equal on all processes. Every group of
# parameters lies in one tensor; each process reduces, updates and keeps optimizer state for its own slice of it only.

# torch 2.13 renamed both; 2.11 and 2.12 know the older names only.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group:
    """Parameters of one kind as consecutive slices of one tensor, padded so that it divides among the processes. They
    and their gradients become views of `weights` and `gradients`. An update is reduce (gradients summed, each process
    receives its slice), update (of that slice, in the subclass), gather (slices to all processes). A reduction starts
    by itself in the backward pass, as soon as the last gradient of the group has arrived."""

    def __init__(self, name: str, parameters: list[nn.Parameter], item: int, config: Config, processes: Processes,
                 every: int = 1, after: int = -1):
        """item: how many trailing axes stay whole when it is sliced: 2 for matrices, 1 for rows, 0 for scalars.
        every, after: it is updated in each so-many-th step after that one."""
        self.name, self.parameters, self.config, self.processes = name, parameters, config, processes
        self.every, self.after = every, after
        pieces = [p.data.reshape(-1, *p.shape[p.dim() - item:]) for p in parameters]
        self.length, world = sum(map(len, pieces)), processes.world
        self.weights = pieces[0].new_zeros(self.length + (-self.length) % world, *pieces[0].shape[1:])
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
        self.shard_gradient = self.gradients if world == 1 else torch.zeros_like(self.shard)
        self.missing, self.work = 0, None
        self.state, self.kernel = [], None  # optimizer buffers and the function that updates the slice
        self.wide = at_least_float32(self.shard.dtype)  # of the buffers, whatever the weights are

    def spread(self, values: list, lengths: list[int]) -> Tensor:
        """One value (or tuple of them) for each parameter -> this process's slice of one for each item."""
        each = torch.tensor(values, dtype=self.wide)
        spread = each.new_zeros(len(self.weights), *each.shape[1:])  # the padding keeps zeros
        spread[:sum(lengths)] = each.repeat_interleave(torch.tensor(lengths), 0)
        return spread[self.mine].to(self.shard.device)

    def collected(self, buffer: Tensor) -> Tensor:
        """This process's slice of an optimizer buffer -> all of it, without the padding, for a checkpoint."""
        whole = buffer
        if self.processes.world > 1:
            whole = buffer.new_empty(len(self.weights), *buffer.shape[1:])
            all_gather(whole.view(torch.uint8), buffer.view(torch.uint8))  # as bytes, which every backend takes
        return whole[:self.length]

    def hand_out(self, whole: Tensor | None, buffer: Tensor) -> None:
        """The way back, for any number of processes: process 0 has all of it, each takes its slice."""
        padded = buffer.new_zeros(len(self.weights), *buffer.shape[1:])
        if whole is not None:
            padded[:self.length] = whole
        if self.processes.world > 1:
            dist.broadcast(padded.view(torch.uint8), 0)
        buffer.copy_(padded[self.mine])

    def compile_update(self) -> None:
        self.kernel = torch.compile(self.kernel, dynamic=False, fullgraph=True)

    def is_due(self, step: int) -> bool:
        return step > self.after and (step + 1) % self.every == 0

    def expect_gradients(self) -> None:
        """The next backward pass is the last: reduce when all are there. Before, the count is below zero throughout."""
        self.missing = len(self.parameters)

    def arrived(self, _parameter) -> None:
        self.missing -= 1
        if self.missing == 0:
            self.reduce()

    def reduce(self) -> None:
        """Start the sum over processes, if it has not been."""
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
        return torch.tensor(value, dtype=self.wide)


# Margin on the norm, and coefficients of the quintics a x + b x^3 + c x^5 that drive every singular value in (0, 1]
# towards 1. Polar Express (#38): each step the best one for what the steps before leave.
ORTHOGONALISERS = {
    "newton-schulz": (1.0, 5 * ((3.4445, -4.7750, 2.0315),)),
    "polar-express": (1.02, tuple(zip(  # a of the five steps, then b, then c
        (8.156554524902461, 4.042929935166739, 3.8916678022926607, 3.285753657755655, 2.3465413258596377),
        (-22.48329292557795, -2.808917465908714, -2.772484153217685, -2.3681294933425376, -1.7097828382687081),
        (15.878769915207462, 0.5000178451051316, 0.5060648178503393, 0.46449024233003106, 0.42323551169305323),
        strict=True))),
    "none": (1.0, ()),
}


def orthogonalise(update: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """(..., rows, columns) -> the same shape in `dtype`: about U V^T of each matrix's U S V^T (Muon). A zero matrix
    stays zero. The size of the input does not matter, however small: its largest entry divides it first."""
    margin, quintics = ORTHOGONALISERS[kind]
    x = update / update.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(update.dtype).tiny)
    x = (x / (margin * x.square().sum((-2, -1), keepdim=True).sqrt()).clamp_min(1)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).reshape(-1, *sorted(x.shape[-2:]))  # (matrices, short side, long side)
    for a, b, c in quintics:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(update.shape)


def equalise_rows(update: Tensor, average: Tensor, beta2: float) -> Tensor:
    """NorMuon (#41): divide each row by its running root mean square, `average`, and keep each matrix's norm. Matrices
    (n, rows, columns), averages (n, rows, 1)."""
    square = update.square().mean(-1, keepdim=True)
    average.lerp_(square, 1 - beta2)
    factor = average.clamp_min(1e-10).rsqrt()
    before, after = (part.sum((-2, -1), keepdim=True).sqrt() for part in (square, square * factor.square()))
    return update * (factor * before / after.clamp_min(1e-10))


def joined(high: Tensor, low: Tensor) -> Tensor:
    """bfloat16 and the 16 bits that it lacks, as int16 -> float32 (#57)."""
    return ((high.view(torch.int16).int() << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def split(wide: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> bfloat16, cut towards zero, and the 16 bits cut off, as int16. The inverse of `joined`."""
    bits = wide.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), ((bits << 16) >> 16).to(torch.int16)


def muon_update(weight: Tensor, gradient: Tensor, momentum: Tensor, average: Tensor, low: Tensor | None, scale: Tensor,
                rate: Tensor, inertia: Tensor, decay: float, beta2: float, kind: str, dtype: torch.dtype) -> None:
    """Nesterov momentum in average form, orthogonalised, its rows equalised; all (matrices, rows, columns), in place.
    Weights decay where the update shrinks them anyway (cautious, #43): by the rate twice, once with the scale."""
    gradient = gradient.to(momentum.dtype)
    momentum.mul_(inertia).add_(gradient * (1 - inertia))
    update = orthogonalise(momentum * inertia + gradient * (1 - inertia), kind, dtype).to(momentum.dtype)
    if beta2:
        update = equalise_rows(update, average, beta2)
    old = weight if low is None else joined(weight, low)
    new = old - scale * rate * (update + decay * rate * old * (update * old >= 0))
    for part, value in [(weight, new)] if low is None else zip((weight, low), split(new), strict=True):
        part.copy_(value)


def adam_update(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, settings: Tensor, factor: Tensor,
                count: Tensor, epsilon: float) -> None:
    """Adam in place; arithmetic in at least float32 whatever the storage, epsilon outside the corrected root. settings:
    (items, 4), rate, beta1, beta2 and decay of each. Decay is cautious as Muon's, by the rate squared (#50)."""
    rate, beta1, beta2, decay = settings.view(-1, 4, *[1] * (weight.dim() - 1)).unbind(1)
    rate, gradient, old = rate * factor, gradient.to(mean.dtype), weight.to(mean.dtype)
    mean.lerp_(gradient, 1 - beta1)
    square.lerp_(gradient.square(), 1 - beta2)
    step = rate * (mean / (1 - beta1**count)) / ((square / (1 - beta2**count)).sqrt() + epsilon)
    weight.copy_(old - step - rate.square() * decay * old * (step * old > 0))


class Muon(Group):
    """Matrices of one shape, orthogonalised as one batch. State, for this process's matrices: momentum, running mean
    squares of rows, and the low bits of the weights where those are bfloat16."""

    def __init__(self, name: str, parameters: list[nn.Parameter], scales: list[float], config: Config,
                 dtype: torch.dtype, processes: Processes):
        """scales: for each matrix of a parameter, in order, the factor on its update."""
        super().__init__(name, parameters, 2, config, processes)
        self.learning_rate, self.dtype, self.kernel = config.muon_lr, dtype, muon_update
        momentum = torch.zeros_like(self.shard, dtype=self.wide)
        self.state = [momentum, torch.zeros_like(momentum[..., :1])]
        if self.weights.dtype == torch.bfloat16:
            self.state.append(torch.zeros_like(self.shard, dtype=torch.int16))
        self.scale = self.spread(scales * len(parameters), [1] * len(scales) * len(parameters))[:, None, None]

    def update(self, step: int) -> None:
        momentum, average, low = (*self.state, None)[:3]
        self.kernel(self.shard, self.shard_gradient, momentum, average, low, self.scale,
                    self.scalar(self.learning_rate * rate_schedule(step, self.config)),
                    self.scalar(momentum_schedule(step, self.config)), self.config.muon_decay,
                    self.config.normuon_beta2, self.config.orthogonaliser, self.dtype)


class Adam(Group):
    """Tables or small weights under Adam. State: mean and square of the gradient for this process's slice."""

    def __init__(self, name: str, parameters: list[nn.Parameter], item: int, settings: list[tuple], config: Config,
                 processes: Processes, after: int = -1):
        """settings: (rate, beta1, beta2, decay) of each parameter."""
        super().__init__(name, parameters, item, config, processes, config.adam_every, after)
        self.learning_rate, self.kernel = max(rate for rate, *_ in settings), adam_update
        self.state = [torch.zeros_like(self.shard, dtype=self.wide) for _ in range(2)]
        self.settings = self.spread(settings, [math.prod(p.shape[:p.dim() - item]) for p in parameters])

    def update(self, step: int) -> None:
        self.kernel(self.shard, self.shard_gradient, *self.state, self.settings,
                    self.scalar(rate_schedule(step, self.config)), self.scalar((step + 1.0) // self.every),
                    self.config.adam_epsilon)


def optimizer_groups(model: GPT, config: Config, dtype: torch.dtype, processes: Processes) -> dict[str, Group]:
    """Every parameter in exactly one group, in the order in which backward completes them."""
    named = dict(model.named_parameters())

    def those(*endings: str) -> list[nn.Parameter]:
        return [p for name, p in named.items() if name.endswith(endings)]

    up_scale = max(1, config.mlp_ratio) ** 0.5  # Muon's sqrt(max(1, outputs / inputs))
    matrices = (("mlp", those(".mlp"), [up_scale, config.down_scale]),
                ("attention", those(".attention"), [config.attention_step] * 4),
                ("gates", those("attention_gate", "value_gate") if config.muon_gates else [], [config.muon_gates]))
    tables = (("values", list(model.value_tables), config.adam_tables, -1),
              ("second", those("second_table"), config.adam_tables, -1),
              ("bigrams", those("bigram_table"), config.adam_tables, -1),
              ("embedding", those("embedding"), config.adam_embedding, last_tied_step(config)))
    large = {id(model.head), *(id(p) for _, parameters, *_ in (*matrices, *tables) for p in parameters)}
    # Gates before scalars, so that each begins on 16 bytes: where layers share a compiled graph, its kernels rely on
    # what they saw of the first layer's, and a GPU's wide loads fault elsewhere.
    small = sorted(((name, p) for name, p in named.items() if id(p) not in large), key=lambda named: -named[1].numel())
    (rate, *betas, _), (smear_share, skip_share) = config.adam_gates, config.gate_shares
    settings = {"attention_gate": config.adam_gates, "value_gate": config.adam_gates, "x0": config.adam_x0,
                "second": config.adam_x0, "smear_gate": (smear_share * rate, *betas, 0.0),  # slower (#52, #55)
                "skip_gate": (skip_share * rate, *betas, 0.0)}
    each = [settings.get(name.split(".")[-1], config.adam_scalars) for name, _ in small]

    groups = [Adam("head", [model.head], 1, [config.adam_head], config, processes)]
    groups += [Muon(name, parameters, scales, config, dtype, processes)
               for name, parameters, scales in matrices if parameters]
    groups += [Adam("small", [p for _, p in small], 0, each, config, processes)] if small else []
    groups += [Adam(name, parameters, 1, [rates] * len(parameters), config, processes, after)
               for name, parameters, rates, after in tables if parameters]
    if processes.world > 1:
        for group in groups:
            dist.broadcast(group.weights, 0)
    return {group.name: group for group in groups}


def untie(model: GPT, groups: dict[str, Group]) -> None:
    """From here on embedding and head are tables of their own, equal so far, as are the moments of their gradients."""
    model.tied, head, embedding = False, groups["head"], groups["embedding"]
    for mine, other in zip((embedding.weights, *embedding.state), (head.weights, *head.state), strict=True):
        mine.copy_(other)


def apply_updates(groups: list[Group], step: int, unsound: Tensor | None = None) -> None:
    """One update of these groups. The reduction of one and the gathering of another run beside the arithmetic. Where a
    loss is `unsound`, () bool, no gradient counts: the weights stay finite, for `first_bad_tensor` to look at."""
    for group in groups:
        group.reduce()
    for group in groups:
        group.wait()
        if unsound is not None and (unsound.is_cuda or unsound):  # a CPU can look, for a GPU one would have to wait
            group.shard_gradient.masked_fill_(unsound, 0)
        group.update(step)
        group.gather()
    for group in groups:
        group.wait()


def parameter_table(groups: dict[str, Group]) -> str:
    """What is trained, by which optimizer, at which rate (where a group has several, the highest)."""
    rows, total = [("group", "tensors", "shape", "dtype", "parameters", "optimizer", "rate")], 0
    for group in groups.values():
        count, shape = sum(p.numel() for p in group.parameters), " x ".join(map(str, group.weights.shape[1:])) or "-"
        rows.append((group.name, len(group.parameters), shape, str(group.weights.dtype)[6:], f"{count:,}",
                     type(group).__name__, f"{group.learning_rate:g}"))
        total += count
    rows.append(("total", "", "", "", f"{total:,}", "", ""))
    return "\n".join("{:10} {:>7} {:>16} {:>9} {:>12} {:>9} {:>8}".format(*row) for row in rows)


# ----------------------------------------------------------------------------------------------------------------------
# One step and one validation. In: batches on the device. Out: updated parameters; losses per token in nats.


def train_step(model: GPT, groups: dict[str, Group], batch: Batch, step: int, signal_number: int = 0) -> Tensor:
    """Forward and backward over the micro-batches, then the updates that are due. Returns (processes, 2) on the device:
    the caller need not wait for it. First each process's loss of the next token, its sum divided by all tokens of the
    step, or NaN if a weight that it keeps is not finite; then the signal it has received, so that all learn of it in
    the same step. Gradients are of the sum over tokens, divided by the first stage's batch throughout: they grow with
    the batch, while Adam's moments go on (#46)."""
    config, processes = model.config, groups["head"].processes
    stage, windows, weights = stage_of(step, config), windows_at(step, config), multi_token_weights(step, config)
    model.enter_stage(stage)
    if model.tied and step > last_tied_step(config):
        untie(model, groups)
    due = [group for group in groups.values() if group.is_due(step)]
    rows, most = len(batch.inputs), rows_at_once(config, batch.inputs.shape[1], processes.device)
    at_once = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= most)
    micros = [Batch(*parts) for parts in zip(*(part.split(at_once) for part in batch[:3]), strict=True)]
    wide = at_least_float32(model.dtype)
    total = torch.stack([0 * group.shard.sum(dtype=wide) for group in groups.values()]).sum()  # 0, or NaN
    for number, micro in enumerate(micros):
        for group in due if number == len(micros) - 1 else ():
            group.expect_gradients()
        loss, next_token = model.loss(micro, attention_masks(model, micro.starts, windows), weights)
        (loss / config.tokens_per_step[0]).backward()
        total += next_token / value_at(config.tokens_per_step, stage)
    reports = report = torch.stack((total, total.new_full((), signal_number)))[None]
    if processes.world > 1:
        reports = report.new_empty(processes.world, 2)
        all_gather(reports, report)
    apply_updates(due, step, ~reports[:, 0].isfinite().all())
    return reports


@torch.no_grad()
def validate(model: GPT, stream: TokenStream, tokens: int, step: int, processes: Processes) -> float:
    """Mean cross-entropy of the next token over the first `tokens` targets of the stream, each counted once, in nats.
    Rows go round the processes in groups as large as a micro-batch, the last may be ragged; the sum over tokens is
    divided once, so that neither the number of processes nor that size matters."""
    config, row, windows = model.config, model.config.val_row_tokens, windows_at(step, model.config)
    rows = rows_at_once(config, row, processes.device)
    model.enter_stage(stage_of(step, config))
    passes = range(-(-tokens // (rows * row * processes.world)))  # as many on every process
    places = ((index * processes.world + processes.rank) * rows * row for index in passes)
    batches = (read_rows(stream, place, rows, row, tokens) for place in places)
    total = torch.zeros((), dtype=torch.float64, device=processes.device)
    for batch in prefetched(batches, processes):
        total += model.loss(batch, attention_masks(model, batch.starts, windows))[1]
    if processes.world > 1:
        dist.all_reduce(total)
    return total.item() / tokens


def warm_up(model: GPT, groups: dict[str, Group], processes: Processes, batch_of, check) -> float:
    """Compile everything on throw-away steps of every stage, put every number back, and return the seconds it took. The
    first process of a machine goes first, the others find its kernels on disk. Nothing is exchanged meanwhile. From
    here on a recompilation is an error, so that none can hide inside the timed region."""
    begin, config, tied = time.perf_counter(), model.config, model.tied
    goes_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    torch.compiler.set_stance("default")
    changed = [tensor for group in groups.values() for tensor in (group.weights, group.gradients, *group.state)]
    kept = [tensor.to("cpu", copy=True) for tensor in changed]  # not on the GPU: they would count as its peak memory
    first = [0, *stage_borders(config)]
    steps = sorted({step + i for step in first for i in range(config.adam_every) if step + i < config.steps})
    for group in groups.values():
        group.processes = Processes(0, 1, processes.device)
    if not goes_first:
        processes.barrier()
    for step in steps:
        train_step(model, groups, batch_of(step), step)
        check(step)
    check(config.steps)
    if goes_first:
        processes.barrier()
    for group in groups.values():
        group.processes = processes
    for tensor, original in zip(changed, kept, strict=True):
        tensor.copy_(original)
    model.tied = tied
    model.enter_stage(0)
    processes.barrier()
    torch.compiler.set_stance("fail_on_recompile")
    if processes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(processes.device)
    return time.perf_counter() - begin


# ----------------------------------------------------------------------------------------------------------------------
# Log and checkpoint. In: numbers and weights. Out: <out>/<run id>/ with log.txt, metrics.jsonl, checkpoints, model.pt.
# Files of tensors are written under a temporary name, flushed to the disk, then renamed: what has its name is whole.


def run_folder(config: Config, resumed: dict | None) -> Path:
    """A new one; or that of the checkpoint which the run goes on from, unless later ones lie there, or the model of a
    finished run: those are not touched."""
    if resumed is not None:
        path = Path(resumed["path"])
        is_last = checkpoints(path.parent)[-1:] == [path] and not path.with_name("model.pt").exists()
        if is_last and os.access(path.parent, os.W_OK):
            return path.parent
    return Path(config.out) / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


class RunLog(contextlib.AbstractContextManager):
    """What a run leaves behind, written by process 0 only; on the other processes every method does nothing. Used as a
    context: what ends the run is the last line of its log."""

    def __init__(self, config: Config, processes: Processes, resumed: dict | None = None):
        """resumed: the checkpoint that the run goes on from."""
        self.config, self.processes, self.folder, self.bar = config, processes, None, None
        self.text = self.metrics = self.saved = None
        if processes.rank > 0:
            return
        folder, records = run_folder(config, resumed), []
        source = Path(__file__).read_text(encoding="utf-8") + "\n" + "=" * 100 + "\n"
        if resumed is not None:
            self.saved = Path(resumed["path"])
            records = records_until(self.saved.with_name("metrics.jsonl"), resumed["step"])
        try:
            folder.mkdir(parents=True, exist_ok=resumed is not None)
            log = folder / "log.txt"
            has_source = log.exists() and log.read_bytes().startswith(source.encode())
            self.text = open(log, "a", buffering=1, encoding="utf-8", newline="\n")
            try:
                import fcntl
                fcntl.flock(self.text, fcntl.LOCK_EX | fcntl.LOCK_NB)  # till this process ends, however it does
            except (ImportError, OSError) as error:  # Windows, or a shared disk, may have no locks
                if isinstance(error, BlockingIOError):
                    raise
            for partial in folder.glob("*.partial"):  # of a run that was killed while writing
                partial.unlink()
            with written_whole(folder / "metrics.jsonl") as file:
                file.write("".join(line + "\n" for line in records).encode())
            self.metrics = open(folder / "metrics.jsonl", "a", buffering=1, encoding="utf-8")
            self.text.write(source * (not has_source))
        except BlockingIOError:
            raise Refusal(f"{folder} is being written to by another process, expected a run that has ended; start a "
                          "new one with --resume none") from None
        except OSError as error:
            raise Refusal(f"cannot write the run folder {folder}: {error.strerror}; name a writable place with --out "
                          "FOLDER") from None
        self.folder = folder
        if sys.stderr.isatty():
            done = resumed["step"] if resumed else 0
            self.bar = tqdm(total=config.steps, initial=done, unit="step", dynamic_ncols=True)

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        """Say in the log what ended the run. Stops by signal have said so themselves."""
        if error is not None and not (isinstance(error, SystemExit) and isinstance(error.code, int)):
            reason = plain_words(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            way_back = "" if "--resume" in reason else self.way_back()
            with contextlib.suppress(Refusal):
                self.line(f"ended: {reason}{way_back}", show=False)
            if way_back and self.saved is not None:  # on the screen the reason follows
                print(way_back.removeprefix("; "), flush=True)
        self.close()

    def way_back(self) -> str:
        """What to do with the newest checkpoint, or with the lack of one."""
        if self.folder is None:
            return ""
        if self.saved is None:
            return "; there is no checkpoint" + (" yet" if self.config.save_every else " (--save-every N makes them)")
        if command := os.environ.get("STARTED_BY"):  # run.sh
            return f"; go on with: {command} --resume {shlex.quote(str(self.saved.absolute()))}"
        script = sys.argv[0] if Path(sys.argv[0]).name == Path(__file__).name else Path(__file__).name
        resume = shlex.join([script, "--resume", str(self.saved)])
        processes = self.processes.world
        if processes == 1:
            return f"; go on with: python {resume}"
        if os.environ.get("LOCAL_WORLD_SIZE", str(processes)) != str(processes):
            return f"; go on with, on every machine, the torchrun command for {resume}"
        return f"; go on with: torchrun --standalone --nproc_per_node={processes} {resume}"

    def write(self, file, text: str) -> None:
        """A line, at once on its way to the disk. Raises Refusal where it has no room."""
        try:
            file.write(text + "\n")
        except OSError as error:
            raise Refusal(f"cannot write {file.name}: {error.strerror}; make room there{self.way_back()}") from None

    def line(self, text: str, show: bool = True) -> None:
        if self.folder is None:
            return
        text = text.encode(errors="backslashreplace").decode()  # names of files may be no text
        self.write(self.text, text)
        if show:
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except OSError:  # nobody reads any more, as behind `| head`, or its disk is full: the run goes on without
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def measured(self, step: int, seconds: float, **losses: float) -> None:
        """One object in metrics.jsonl, and a line as speedrun logs have it; `step` counts the updates done."""
        if self.folder is None:
            return
        tokens, (kind, loss) = tokens_until(step, self.config), next(iter(losses.items()))
        record = {"step": step, "tokens": tokens, **losses, "train_time_s": round(seconds, 6)}
        self.write(self.metrics, json.dumps(record))
        if kind == "val_loss" or step % 10 == 0 or step < 10:
            self.line(f"step:{step}/{self.config.steps} {kind}:{loss:.4f} train_time:{1000 * seconds:.0f}ms "
                      f"step_avg:{1000 * seconds / max(1, step):.2f}ms", show=kind == "val_loss" or self.bar is None)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{kind} {loss:.4f}, {tokens / max(seconds, 1e-9):,.0f} tokens/s")
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        for part in (self.bar, self.text, self.metrics):
            if part is not None:
                with contextlib.suppress(OSError):  # what could not be written has been said
                    part.close()


def environment(processes: Processes) -> str:
    """Versions and hardware, for the log."""
    lines = [f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
             f"{platform.system()} {platform.machine()}, {processes.world} process(es)"]
    if processes.device.type == "cpu":
        bf16 = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
        lines += [f"CPU, {torch.get_num_threads()} threads per process, {os.cpu_count()} cores, {bf16} avx512_bf16"]
    else:
        lines += [f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(processes.device)}"]
        if processes.rank == 0 and shutil.which("nvidia-smi"):
            lines += [subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout]
    return "\n".join(lines)


def peak_memory(device: torch.device) -> float:
    """Most memory this process has held so far, in MiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return math.nan
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def compile_cache_name() -> str:
    """A file for each process of a machine, for compiled graphs name the GPU that they are for."""
    return f"compile_cache_{os.environ.get('LOCAL_RANK', '0')}.bin"


def load_compile_cache(config: Config) -> str:
    """Give the compiler what the newest run with a cache has left: a restart then compiles in seconds. What was made
    for other code, another torch or another GPU is simply not found in it. Returns what to say of it."""
    cache, found = max(Path(config.out).glob(f"*/{compile_cache_name()}"), default=None), None
    if cache is None:
        return "the first time takes minutes"
    logging.getLogger("torch.compiler._cache").setLevel(logging.CRITICAL)  # a damaged file is worth no traceback
    with contextlib.suppress(Exception):
        content = cache.read_bytes()
        if content[:32] == hashlib.sha256(content[32:]).digest():
            found = torch.compiler.load_cache_artifacts(content[32:])
    return f"reusing {cache}" if found else f"{cache} is damaged and not used: it takes minutes"


def save_compile_cache(path: Path) -> str:
    """What the compiler made in this process, into the run folder. Returns what to say of it."""
    artifacts = torch.compiler.save_cache_artifacts()
    try:
        if artifacts is not None:
            path.parent.mkdir(parents=True, exist_ok=True)  # on the first machine it is there
            with written_whole(path) as file:
                file.write(hashlib.sha256(artifacts[0]).digest() + artifacts[0])
        return f"kept in {path}"
    except OSError as error:  # no reason to stop a run
        return f"not kept: {path}: {error.strerror}"


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator:
    """A binary file to write to, that takes the place of `path` once it is on the disk; after an error it is gone."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # the new name as well; not every system can
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def records_until(path: Path, step: int) -> list[str]:
    """The lines of a metrics.jsonl up to a step. A last one that was cut off by a crash is left out."""
    lines = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        for line in path.read_bytes().splitlines():
            if json.loads(line)["step"] <= step:
                lines.append(line.decode())
    return lines


def save_model(path: Path, model: GPT, stream: TokenStream, step: int, val_loss: float, **more) -> None:
    """Weights, plain values and what else is given, for `torch.load(weights_only=True)`. Raises Refusal where it cannot
    be written."""
    saved = {"config": dataclasses.asdict(model.config), "vocabulary": stream.vocabulary,
             "separator": stream.separator, "dtype": str(model.dtype).removeprefix("torch."),
             "shards": stream.fingerprint, "step": step, "val_loss": val_loss, **more,
             "weights": {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}}
    try:
        with written_whole(path) as file:
            torch.save(saved, file)
    except (OSError, RuntimeError) as error:  # of a full disk torch makes the latter, with the former behind it
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise Refusal(f"cannot write {path}: {' '.join(str(reason).split())[:200]}; make room there, or name another "
                      "folder with --out FOLDER") from None


def save_checkpoint(log: RunLog, model: GPT, groups: dict[str, Group], stream: TokenStream, processes: Processes,
                    step: int, loss: float, **more) -> None:
    """All that the run needs to go on after `step` updates, whole whatever the number of processes, by process 0. Of
    the checkpoints before it the newest are kept. Nothing is drawn at random after the first weights: what decides the
    order of rows is the cursor and the seed. The state of torch's generator is kept for what a reader may add."""
    state = {}
    for group in groups.values():
        for number, buffer in enumerate(group.state):
            whole = group.collected(buffer)
            if processes.rank == 0:
                state[f"{group.name}.{number}"] = whole.to("cpu", copy=True)
    if log.folder is not None:
        path = log.folder / f"checkpoint_{step:07}.pt"
        save_model(path, model, stream, step, loss, state=state, random_state=torch.get_rng_state(), **more)
        log.saved = path
        for older in checkpoints(log.folder)[:-model.config.keep]:
            older.unlink(missing_ok=True)
    processes.barrier()


def checkpoints(folder: Path) -> list[Path]:
    """Those of a run, oldest first."""
    return sorted(folder.glob("checkpoint_*.pt"))


# What files hold beside their tensors, by kind: every one, and those that a run can go on from.
SAVED = {"config": dict, "weights": dict, "step": int, "vocabulary": int, "separator": int, "dtype": str,
         "val_loss": float, "shards": dict}
TO_GO_ON = {"state": dict, "cursor": tuple, "seconds": float, "validated": int, "random_state": Tensor}


def unusable(path: str | Path, error: Exception) -> Refusal:
    reason = " ".join(str(error).split()).split(". ")[0][:200] or "no reason given"
    if isinstance(error, zipfile.BadZipFile):
        reason = "torch.save has not written it"
    elif type(error) is not ValueError:  # whose words are ours
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}, {reason}"
    return Refusal(f"cannot use {path} as a checkpoint: {reason}; expected a file written by this train_gpt2.py; train "
                   "one: python train_gpt2.py --preset tiny")


def read_saved(path: str | Path, whole: bool = True) -> dict:
    """What `save_model` wrote, its tensors still on the disk, and its path; `whole`: after every checksum in the file
    has been compared. Raises Refusal for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            damaged_part = archive.testzip() if whole else None
        if len(names) > len({*names}):  # the checksum of only one of two would be compared
            raise ValueError("two of its parts have one name")
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if damaged_part or not isinstance(saved, dict):
            raise ValueError(f"{damaged_part} is damaged" if damaged_part else "it holds something else")
        for name, kind in (SAVED | TO_GO_ON if "state" in saved else SAVED).items():
            if type(saved.get(name)) is not kind:
                raise ValueError(f"it has no {name}")
        if saved["step"] < 0 or not 0 <= saved["separator"] < saved["vocabulary"] <= 65_536:
            raise ValueError(f"it states step {saved['step']}, a vocabulary of {saved['vocabulary']} and separator "
                             f"{saved['separator']}")
        for name, tensor in (*saved["weights"].items(), *saved.get("state", {}).items()):
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta or not (
                    tensor.is_contiguous()):
                raise ValueError(f"its {name} is no plain tensor")
            if whole and not tensor.isfinite().all():
                raise ValueError(f"its {name} is not finite")
        if "state" in saved:
            _position, deals, left = cursor = saved["cursor"]
            counts = (*cursor, saved["step"], saved["validated"])
            if any(type(count) is not int or not 0 <= count < 2**63 for count in counts) or left and not deals or not (
                    0 <= saved["seconds"] < math.inf and math.isfinite(saved["val_loss"])):
                raise ValueError(f"it states data position, step and last validation as {counts}, the clock as "
                                 f"{saved['seconds']}, its loss as {saved['val_loss']}")
            torch.Generator().set_state(saved["random_state"])
        return saved | {"path": str(path)}
    except Exception as error:  # whatever the file system, the archive or the unpickler object to
        raise unusable(path, error) from None


def config_of(saved: dict) -> Config:
    """The settings of a saved run, checked like a command line. Raises Refusal."""
    options = {option.name: option for option in fields(Config)}
    for name in {*options} ^ {*saved["config"]}:
        raise Refusal(f"{saved['path']} was written by another version of train_gpt2.py: its setting {name} is "
                      f"{'missing' if name in options else 'unknown here'}; use that version, with which its log.txt "
                      "begins")
    for name, value in saved["config"].items():
        if repr(parse_value(spelled_flag(name), spelled(value, exact=True), options[name])) != repr(value):
            raise Refusal(f"{saved['path']} holds {name} = {value!r}, which is no {options[name].metadata['unit']}; "
                          "use another checkpoint")
    return check_config(Config(**saved["config"]))


def check_shapes(saved: dict, config: Config) -> None:
    """Raises Refusal where the weights are not those of the settings, before anything of that size is made."""
    try:
        with torch.device("meta"):
            shapes = {name: (p.shape, p.dtype) for name, p in
                      GPT(config, saved["vocabulary"], getattr(torch, saved["dtype"])).state_dict().items()}
        held = {name: (tensor.shape, tensor.dtype) for name, tensor in saved["weights"].items()}
        if difference := first_difference(shapes, held):
            name, expected, found = difference
            raise ValueError(f"its {name} is {found}, that of its settings {expected}")
    except Exception as error:
        raise unusable(saved["path"], error) from None


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, dict]:
    """A model that `save_model` wrote, and the values beside it. Raises Refusal for any other file."""
    saved = read_saved(path)
    config = config_of(saved)
    check_shapes(saved, config)
    model = GPT(config, saved["vocabulary"], getattr(torch, saved["dtype"]))
    model.load_state_dict(saved["weights"])
    model.tied = tied_after(saved["step"], config)
    model.enter_stage(stage_of(saved["step"], config))
    return model.to(device), saved


def find_checkpoint(place: str | Path, whole: bool = True) -> dict:
    """A checkpoint by its path, or the newest of a run folder that is not damaged. Raises Refusal."""
    if not Path(place).exists():
        newest = "".join(f"; the newest beside it is {path}" for path in checkpoints(Path(place).parent)[-1:])
        raise Refusal(f"{place} does not exist; expected a checkpoint, a run folder, auto or none{newest}")
    paths = [Path(place)] if not Path(place).is_dir() else checkpoints(Path(place))[::-1]
    refusal = Refusal(f"{place} holds no checkpoint_*.pt; expected a run folder with one (--save-every N makes them)")
    for path in paths:
        try:
            saved = read_saved(path, whole)
            if "state" in saved:
                return saved
            refusal = Refusal(f"{path} holds a model without its optimizer; expected a checkpoint_*.pt (--save-every N "
                              "makes them)")
        except Refusal as error:
            refusal = error
    raise refusal


# What two runs may differ in and still be the same one to --resume auto.
INCIDENTAL = ("out", "save_every", "keep", "resume", "patience", "micro_tokens", "recompute", "loss_chunk", "device",
              "compile")


def changed_settings(theirs: Config, ours: Config) -> list[str]:
    return [spelled_flag(f.name) for f in fields(Config)
            if f.name not in INCIDENTAL and getattr(theirs, f.name) != getattr(ours, f.name)]


def newest_of_this_run(config: Config, stream: TokenStream) -> dict | None:
    """The newest checkpoint of the newest run with these settings below --out, if there is one; where that run is
    finished, on the same shards, its model."""
    for folder in sorted(Path(config.out).glob("*/"), reverse=True):
        with contextlib.suppress(Refusal):
            is_finished = (folder / "model.pt").exists()
            saved = read_saved(folder / "model.pt", False) if is_finished else find_checkpoint(folder, False)
            # Settings are compared before gigabytes are read through.
            if not changed_settings(config_of(saved), config):
                if not is_finished:
                    return find_checkpoint(folder)
                if saved["shards"] == stream.fingerprint:
                    return saved
    return None


def check_way_on(saved: dict, config: Config, stream: TokenStream) -> None:
    """Raises Refusal where a run with these settings on these shards cannot go on from a checkpoint."""
    path, step, theirs = saved["path"], saved["step"], config_of(saved)
    if difference := first_difference(stream.fingerprint, saved["shards"]):
        name, found, expected = difference
        raise Refusal(f"{path} was trained on other shards: {name} has (tokens, vocabulary, separator, checksum) "
                      f"{found}, expected {expected}; name those with --train-files")
    if step >= config.steps:
        raise Refusal(f"{path} is after step {step} of --steps {config.steps}; the nearest is --steps {step + 1}")
    check_shapes(saved, theirs)
    try:
        check_shapes(saved, config)
    except Refusal:
        raise Refusal(f"{path} has weights of another shape than this run; leave out what changes them of "
                      f"{', '.join(changed_settings(theirs, config))}") from None
    if tied_after(step, theirs) != tied_after(step, config):  # an embedding never trained, or one to be forgotten
        part, now = last_tied_step(theirs) + 1, last_tied_step(config) + 1
        share = min(max(0.0, (part - 1) / max(1, stage_ends(config)[-1])), 1 - 1e-9)
        raise Refusal(f"{path} is after step {step}, its embedding and head part after step {part}, with these "
                      f"settings after step {now}; the nearest is --tied-until {share:.9g}")


def open_checkpoint(config: Config, stream: TokenStream, processes: Processes) -> tuple[dict | None, dict | None]:
    """What --resume names: its plain values on every process, among them whether that run is finished, and all of it
    on process 0, which alone reads the file. Raises Refusal."""
    saved, plain = None, None
    if processes.rank == 0 and config.resume != "none":
        saved = newest_of_this_run(config, stream) if config.resume == "auto" else find_checkpoint(config.resume)
    if saved is not None:
        is_finished = "state" not in saved
        plain = {name: value for name, value in saved.items() if name not in ("weights", "state")}
        plain["finished"] = is_finished
        if not is_finished:
            check_way_on(saved, config, stream)
    return processes.told(plain), saved


def restore(saved: dict | None, step: int, model: GPT, groups: dict[str, Group], processes: Processes) -> None:
    """Weights and optimizer state as they were after `step` updates, from what process 0 has read, whichever number of
    processes wrote it. Raises Refusal before anything is changed."""
    if saved is not None:
        wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
        wanted |= {f"{group.name}.{number}": (torch.Size((group.length, *buffer.shape[1:])), buffer.dtype)
                   for group in groups.values() for number, buffer in enumerate(group.state)}
        held = {name: (tensor.shape, tensor.dtype) for name, tensor in (saved["weights"] | saved["state"]).items()}
        if difference := first_difference(wanted, held):
            name, expected, found = difference
            raise Refusal(f"the checkpoint's {name} is {found}, this run's {expected}; give the settings and the "
                          "--dtype that it was written with")
        model.load_state_dict(saved["weights"])
    processes.barrier()  # however long that took
    for group in groups.values():
        if processes.world > 1:
            dist.broadcast(group.weights, 0)
        for number, buffer in enumerate(group.state):
            group.hand_out(saved and saved["state"][f"{group.name}.{number}"], buffer)
    model.tied = tied_after(step, model.config)


# ----------------------------------------------------------------------------------------------------------------------
# Training loop. In: a Config. Out: the trained model and the run folder.


def open_data(config: Config) -> tuple[TokenStream, TokenStream, int]:
    """Both streams and the number of validation tokens. Raises Refusal before anything is computed or written."""
    train, val = TokenStream(config.train_files), TokenStream(config.val_files)
    if (train.vocabulary, train.separator) != (val.vocabulary, val.separator):
        raise Refusal(f"training shards have (vocabulary, separator) {train.vocabulary, train.separator}, validation "
                      f"shards {val.vocabulary, val.separator}; encode both alike: {shard_command(config.train_files)}")
    for stream, pattern, least in ((train, config.train_files, max(config.row_tokens) + 1), (val, config.val_files, 2)):
        if stream.tokens < least:
            raise Refusal(f"{pattern} holds {stream.tokens} token{'s' * (stream.tokens > 1)}, expected {least} or "
                          f"more; get them: {shard_command(pattern)}")
    needed, inputs = tokens_needed(train, config), tokens_until(config.steps, config)
    if needed > 4 * inputs + train.tokens // len(train.shards):
        raise Refusal(f"--long-documents drop would keep one token in {needed / inputs:.0f}: the documents of "
                      f"{config.train_files} are long; give --long-documents continue")
    if needed > train.tokens and not config.repeat:
        shards = len(train.shards) + math.ceil((needed - train.tokens) / max(s.tokens for s in train.shards))
        most, needs = config.steps, needed
        while most and needs > train.tokens:  # the borders of the stages are rounded
            most = min(most - 1, most * train.tokens // needs)
            needs = tokens_needed(train, dataclasses.replace(config, steps=most)) if most else 0
        raise Refusal(f"the run needs {needed:,} training tokens, {config.train_files} holds {train.tokens:,}; get "
                      f"more: {shard_command(config.train_files, shards)}; or give --repeat true"
                      + f" or --steps {most}" * (most > 0))
    return train, val, min(config.val_tokens, val.tokens - 1)


class Clock:
    """Seconds of training. It is stopped, after the device has finished, while anything else runs."""

    def __init__(self, processes: Processes, seconds: float = 0.0):
        self.processes, self.seconds, self.started = processes, seconds, None

    def start(self) -> None:
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


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """A list that receives the number of the first SIGTERM or SIGINT, for the run to act on when a step is done. One
    more ends the process at once; but within a second under torchrun it is the same one, sent by torchrun as well."""
    received, began, echo = [], 0.0, 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def note(number: int, _frame) -> None:
        nonlocal began
        if received and time.monotonic() >= began + echo:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not received:
            received.append(number)
            began = time.monotonic()
            if os.environ.get("RANK", "0") == "0":  # not print: this may come in the middle of one
                text = f"{signal.Signals(number).name}: finishing the step and saving; once more ends at once\n"
                with contextlib.suppress(OSError):  # nobody reads any more, as Ctrl-C ends `2>&1 | tee` too
                    os.write(2, text.encode())

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def bad_parameters(model: GPT) -> str:
    """Names the first parameter that is not finite; empty where all are."""
    bad = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    return f"first bad tensor: parameter {bad[0]}, one of {len(bad)}" if bad else ""


@torch.no_grad()
def first_bad_tensor(model: GPT, batch: Batch, step: int, stream: TokenStream) -> str:
    """What a loss that is not finite comes from: the first parameter that is not, else the first output along the
    forward pass, taken eagerly and row by row; and where the tokens of that row lie."""
    found, outputs = bad_parameters(model), []
    model.compiled, model.run_block, model.loss_of_chunk, model.float8 = False, run_block, loss_of_chunk, False
    for block in model.blocks:
        block.register_forward_hook(lambda _block, _inputs, output: outputs.append(bool(output[0].isfinite().all())))
    for row, place in enumerate(batch.places):
        outputs.clear()
        alone = Batch(*(part[row:row + 1] for part in batch[:3]))
        if not model.loss(alone, attention_masks(model, alone.starts, windows_at(step, model.config)))[1].isfinite():
            part = f"output of blocks.{outputs.index(False)}" if False in outputs else "the loss"
            found = found or f"first bad tensor: {part}"
            break
    else:
        found, place = found or "no tensor is bad when it is computed anew", batch.places[0]
    _, shard, position = stream.place(place)
    return f"{found}; its tokens: {shard.path} from {position}"


MEMORY_TOOL = Path(__file__).parent / "records" / "timing.py"


def fitted(config: Config, vocabulary: int, dtype: torch.dtype, processes: Processes, log: RunLog) -> Config:
    """Say how much memory each GPU will need, which records/timing.py predicts from shapes, and where that is more than
    it has, which settings fit: --micro-tokens auto takes them. The training stays the same."""
    if processes.device.type == "cpu" or not MEMORY_TOOL.exists():
        return config
    sys.modules.setdefault("train_gpt2", sys.modules[__name__])  # which is what that tool imports
    sys.path.append(str(MEMORY_TOOL.parent))
    import timing
    capacity = min(processes.gathered(torch.cuda.get_device_properties(processes.device).total_memory))
    case = config, vocabulary, dtype, processes.world, processes.device, capacity
    changes = timing.settings_that_fit(*case)
    log.line(timing.fit_line(*case, changes))
    if changes and not config.micro_tokens:
        log.line("--micro-tokens auto takes them")
        return dataclasses.replace(config, **changes)
    return config


def not_finite(what: str, found: str, log: RunLog) -> Refusal:
    return Refusal(f"{what}; {found}; none of it was written{log.way_back()}; try lower rates there (--muon-lr, "
                   "--adam-head, --adam-tables)")


class Reports:
    """What steps have reported and nobody has read: on a GPU always that of the newest, for the host runs ahead of it.
    To read one is to log its losses and to learn of a signal to any process (`stop`, 0: none). Raises Refusal for a
    loss that is not finite, and for a step that has not ended within the patience."""

    def __init__(self, model: GPT, stream: TokenStream, processes: Processes, log: RunLog, clock: Clock):
        self.model, self.stream, self.processes, self.log, self.clock = model, stream, processes, log, clock
        self.on_gpu, self.stop, self.unread = processes.device.type == "cuda", 0, deque()

    def add(self, step: int, batch: Batch, reports: Tensor) -> None:
        """reports: (processes, 2) of `train_step`, on the device."""
        reports = reports.to("cpu", non_blocking=True)
        self.unread.append((step, batch, reports, torch.cuda.current_stream().record_event() if self.on_gpu else None))
        self.read(int(self.on_gpu))

    def read(self, left: int = 0) -> None:
        """The oldest first, until so many are left."""
        while len(self.unread) > left:
            step, batch, reports, there = self.unread.popleft()
            deadline, patience = time.monotonic() + self.model.config.patience, self.model.config.patience
            while there is not None and not there.query():
                if time.monotonic() > deadline:  # not there.synchronize(), from which NCCL would abort without a word
                    raise Refusal(f"step {step + 1} has not ended within --patience {patience} s: another process has "
                                  f"ended or hangs{self.log.way_back()}")
                time.sleep(0.0005)
            losses, signals = reports.unbind(1)
            bad = [rank for rank, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
            if bad:
                mine = self.processes.rank == bad[0] and first_bad_tensor(self.model, batch, step, self.stream)
                raise not_finite(f"the training loss of step {step + 1} is not finite in process "
                                 f"{', '.join(map(str, bad))}, or a weight there",
                                 self.processes.gathered(mine)[bad[0]], self.log)
            self.log.measured(step + 1, self.clock.now(), train_loss=float(losses.sum()))
            self.stop = self.stop or int(signals.max())


def training_loop(model: GPT, groups: dict[str, Group], streams: tuple, processes: Processes, log: RunLog,
                  resumed: dict | None) -> float:
    """All steps that are left, with their validations and checkpoints. Returns the last validation loss. Raises Refusal
    for numbers that are not finite; SystemExit, 128 + its number, after a signal."""
    (stream, val_stream, val_tokens), config = streams, model.config
    first, seconds, validated, val_loss, following = 0, 0.0, -1, math.nan, Cursor()
    if resumed is not None:
        first, seconds, validated, val_loss = (resumed[name] for name in ("step", "seconds", "validated", "val_loss"))
        following = Cursor(*resumed["cursor"])
        torch.set_rng_state(resumed["random_state"])
    period = math.ceil(config.save_every / config.adam_every) * config.adam_every  # no gradient waits for Adam then
    clock = Clock(processes, seconds)
    reports = Reports(model, stream, processes, log, clock)

    def judged(step: int, tokens: int) -> float:
        loss, found = validate(model, val_stream, tokens, step, processes), bad_parameters(model)
        if found or not math.isfinite(loss):
            raise not_finite(f"after {step} steps the validation loss is {loss:.4f}", found or "no weight is bad", log)
        return loss

    def keep(step: int) -> None:
        few = processes.world * max(config.val_row_tokens, config.micro_tokens or 1024)  # a pass on each process
        loss = val_loss if step == validated else judged(step, min(few, val_tokens))
        save_checkpoint(log, model, groups, stream, processes, step, loss, seconds=clock.now(), validated=validated,
                        cursor=tuple(following))

    batches = prefetched(step_batches(stream, config, processes, first, following), processes)
    with noted_signals() as received:
        for step in range(first, config.steps + 1):
            validating = step != validated and (step in (0, config.steps)
                                                or config.val_every > 0 and step % config.val_every == 0)
            settled = first < step < config.steps and step % config.adam_every == 0
            saving = settled and period > 0 and step % period == 0
            if validating or saving or settled and reports.stop:
                reports.read()  # first, for it waits with patience
                clock.stop()
                ending = settled and reports.stop > 0
                if validating and not ending:
                    val_loss, validated = judged(step, val_tokens), step
                    log.measured(step, clock.now(), val_loss=val_loss,
                                 peak_memory_mib=round(peak_memory(processes.device), 1))
                if saving or ending:
                    keep(step)
                if ending:
                    log.line(f"stopped by {signal.Signals(reports.stop).name} after step {step} of {config.steps}, "
                             f"status {128 + reports.stop}{log.way_back()}")
                    raise SystemExit(128 + reports.stop)
                if step == config.steps:
                    break
            if clock.started is None:
                clock.start()
            batch = next(batches)
            following = batch.following
            reports.add(step, batch, train_step(model, groups, batch, step, max(received, default=0)))
        if log.folder is not None:
            save_model(log.folder / "model.pt", model, stream, config.steps, val_loss)
        processes.barrier()
    log.line(f"final val_loss {val_loss:.4f} nats per token, training time {clock.now():.2f} s, "
             f"{tokens_until(config.steps, config) / clock.now():,.0f} tokens/s, peak memory "
             f"{peak_memory(processes.device):,.0f} MiB; all of it in {log.folder}")
    return val_loss


def compile_everything(model: GPT, groups: dict[str, Group], streams: tuple, processes: Processes, log: RunLog) -> None:
    """Compile for every stage before the clock starts, with what an earlier run has left of that."""
    (stream, val_stream, _), config = streams, model.config
    model.compile_parts()
    for group in groups.values():
        group.compile_update()
    cache, alone = load_compile_cache(config), Processes(0, 1, processes.device)
    log.line(f"compiling for every stage; {cache}")
    seconds = warm_up(model, groups, processes,
                      lambda step: next(prefetched(step_batches(stream, config, processes, step), processes)),
                      lambda step: validate(model, val_stream, 1, step, alone))
    folder = processes.told(str(log.folder))  # that process 0 made
    kept = save_compile_cache(Path(folder) / compile_cache_name())
    processes.barrier()
    log.line(f"compiled in {seconds:.0f} s, untimed, {kept}")


def train(config: Config, processes: Processes) -> Path | None:
    """The whole run. Returns the run folder (None on processes other than 0). Raises Refusal, or leaves a model; after
    SIGTERM or SIGINT leaves a checkpoint and raises SystemExit."""
    check_processes(config, processes.world)
    dtype = compute_dtype(config, processes.device)
    use_float8 = float8_head(config, dtype, processes.device)
    processes.must_agree("setting", {
        **dataclasses.asdict(config), "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12],
        "dtype": str(dtype), "float8": use_float8, "device": processes.device.type, "torch": torch.__version__,
        "triton": importlib.util.find_spec("triton") is not None, "records": MEMORY_TOOL.exists()},
        "start all with the same files, software and options")
    stream, val_stream, val_tokens = streams = open_data(config)
    processes.must_agree("shard", stream.fingerprint | val_stream.fingerprint, "give all machines the same shards")
    resumed, saved = open_checkpoint(config, stream, processes)
    if resumed is not None and resumed["finished"]:  # so that a job which is repeated until it is done ends
        folder = Path(resumed["path"]).parent
        if processes.rank == 0:
            print(f"this run is finished, all of it in {folder}; --resume none starts anew")
        return folder if processes.rank == 0 else None
    with RunLog(config, processes, resumed) as log:
        log.line(environment(processes), show=False)
        config = fitted(config, stream.vocabulary, dtype, processes, log)
        log.line(json.dumps(dataclasses.asdict(config)), show=False)
        log.line(f"shards {json.dumps({'train': stream.fingerprint, 'val': val_stream.fingerprint})}", show=False)
        model = GPT(config, stream.vocabulary, dtype).to(processes.device)
        model.float8 = use_float8
        groups = optimizer_groups(model, config, dtype, processes)
        log.line(parameter_table(groups))
        log.line(f"{config.preset}: {config.steps} steps of {spelled(config.tokens_per_step)} tokens in rows of "
                 f"{spelled(config.row_tokens)}; {processes.world} process(es) on {processes.device.type}, "
                 f"{str(dtype)[6:]}" + ", head in float8" * use_float8)
        if val_tokens < config.val_tokens:
            log.line(f"notice: validating on all {val_tokens:,} targets of {config.val_files}, fewer than --val-tokens "
                     f"{config.val_tokens}")
        if resumed is not None:  # before minutes of compiling, which puts every number back
            restore(saved, resumed["step"], model, groups, processes)
            log.line(f"resumed after step {resumed['step']} from {resumed['path']}")
            saved = None
        elif config.resume == "auto":
            log.line(f"no checkpoint of this run in {config.out}: starting from the beginning")
        if can_compile(config, processes, dtype, log):
            compile_everything(model, groups, streams, processes, log)
        training_loop(model, groups, streams, processes, log, resumed)
    return log.folder


def plain_words(error: BaseException) -> str | None:
    """One line for what a run may end of; None for a defect of the code, which keeps its traceback."""
    text = " ".join(re.sub(r"\[/\S+\]", "", str(error)).split())
    if isinstance(error, Refusal):
        return str(error.code)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted before the first step: there was nothing to save"
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in text:
        return ("the GPU has too little memory; the same training needs less of it with --recompute true "
                "--loss-chunk 2048")
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and re.search(
            "DefaultCPUAllocator|Storage size calculation overflowed|out of memory", text):
        return f"the machine has too little memory ({text[:160]}); take a smaller --width, --layers or --val-row-tokens"
    lost = "gloo|monitoredBarrier|NCCL|pair closure"  # the last is gloo's word for a time-out
    if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and re.search(lost, str(error)):
        said = re.sub(r" in \d+ ms", "", text.split("Last error: ")[-1].split(" Original exception")[0].split(". ")[0])
        return (f"the connection to another process is lost: it has ended, or kept silent for longer than --patience "
                f"({said[:160]}); what it said itself stands above or in its machine's output")
    return None


def main(arguments: list[str] | None = None) -> None:
    """The command line. Every process sees the same bad input: process 0 says so, the others leave it the word."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less waste where sizes vary
    try:
        config = parse_command_line(sys.argv[1:] if arguments is None else arguments)
        train(config, start_processes(config))
    except BaseException as error:
        line = plain_words(error)
        if line is None:
            if isinstance(error, SystemExit) and dist.is_initialized():  # stopped by a signal, all together
                dist.destroy_process_group()
            raise
        if os.environ.get("RANK", "0") != "0":
            # torchrun ends the job when process 0 has spoken; what only this process saw is said after. Where a
            # connection is lost, others wait for this process to go before they notice: it goes sooner.
            time.sleep(5 if isinstance(error, Refusal) else 0.5)
        status = 130 if isinstance(error, KeyboardInterrupt) else 1  # 128 + SIGINT, as shells count
        if dist.is_initialized() or status == 130:
            print(line, file=sys.stderr, flush=True)
            if dist.is_initialized():
                os._exit(status)  # an ordinary end would wait for processes that do not answer
            raise SystemExit(status) from None
        raise Refusal(line) from None
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
