"""Train a GPT-2-class model to 3.28 validation loss on FineWeb, as fast as 8 H100s can, in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt2.py    # gpt2: what 84 records of the speedrun found
    python train_gpt2.py --preset five-minute                 # record 12, from which this file grew
    python train_gpt2.py --preset tiny                        # a small model, on a CPU
    python train_gpt2.py --help                               # every setting

Part I is the recipe, in the order in which data flows:

    config -> schedules -> shards to rows -> masks -> model -> loss -> gradients of tables
    -> optimizers -> a step -> the loop

Part II is the machinery: command line, processes, log, checkpoints, clock and signals, errors.

Importing this file does nothing. A run's state is the model's parameters, the optimizers' buffers
and a Progress; its settings are a frozen Config. (#49) means that record 49 of the speedrun brought
a technique.
Shapes: R rows of T tokens, D width, H heads, K = D / H, V vocabulary. An argument given by its shape
is a tensor; `config` is always a Config, `model` a GPT, `step` the number of updates before;
`processes` tells this process's rank, how many there are, its device (Processes, in Part II).
"""

import argparse
import contextlib
import difflib
import fcntl
import glob
import importlib
import json
import math
import os
import platform
import re
import resource
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from bisect import bisect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint as activation_checkpoint
from tqdm import tqdm

try:  # comes with torch for GPUs
    import triton
    import triton.language as tl
except ImportError:
    triton = None


class UserError(SystemExit):
    """Bad input, in one line: what was found, what was expected, what mends it. Exit status 1."""

    def __init__(self, line):
        super().__init__(" ".join(line.splitlines()))


def tool(name):
    """How to call a script of this repository from the current folder."""
    path = name if os.path.exists(name) else Path(__file__).parent / name
    return f"python {shlex.quote(str(path))}"


def script_text():
    """The text of this script."""
    return Path(__file__).read_text(encoding="utf-8")


# ==================================================================================================
# PART I: THE RECIPE
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# Config: the settings of a run, its techniques, and the presets.

STAGES = 3  # equal parts of the schedule; the extension after them is one more


class Kind(NamedTuple):
    """What a setting takes: a path, one of `choices`, a number from `low` to `high`, or as many
    numbers as `lengths` allows. The comment on a setting's line is its help."""

    of: type
    low: float = 0
    high: float = 1e12
    lengths: range | None = None
    choices: dict = {}  # text -> value


def one_of(*choices):
    return Kind(str, choices={choice: choice for choice in choices})


STAGE_LENGTHS = range(1, STAGES + 2)  # how many values; the last repeats
FilePath = Kind(str)
Flag = Kind(bool, choices={"true": True, "false": False})
Number = Kind(float)
Whole = Kind(int)
Count = Kind(int, 1)
Share = Kind(float, 0, 1)
Decay = Kind(float, 0, 0.9999)
ByStage = Kind(int, 1, 2**24, STAGE_LENGTHS)
Layers = Kind(int, 0, 1000, range(1000))
Cap = Kind(float, -1e6, 1e6, range(3, 4))
AdamRates = Kind(float, 0, 0.9999, range(4, 5))  # rate, beta1, beta2, weight decay


@dataclass(frozen=True)
class Recipe:
    """The settings that decide a run's numbers, up to rounding; a checkpoint keeps them. The
    defaults are gpt2: records 1 to 83 and 88, without their custom kernels."""

    preset: one_of("gpt2", "five-minute", "tiny", "gpt2-medium", "gpt2-xl") = "gpt2"  # where settings start
    steps: Count = 1375  # updates in all; schedules stretch with them
    seed: Kind(int, 0, 2**63 - 1) = 0  # of initial weights and shuffling
    # data
    repeat: Flag = False  # start over when the training shards are used up
    shuffle: Flag = False  # take rows in random order, each once per epoch
    long_documents: one_of("drop", "continue") = "drop"  # what to do with the rest of a cut document
    document_tokens: Kind(int, 0, 2**24, STAGE_LENGTHS) = (896, 2048)  # longest document; 0: the row
    tokens_per_step: ByStage = (131_072, 262_144, 393_216)  # batch size in tokens
    row_tokens: ByStage = (16_384, 32_768, 49_152)  # length of a row
    extension: Kind(float, 0, 0.9) = 10 / 1375  # last share of the steps, after the end of the schedule
    val_every: Whole = 250  # updates between validations; 0: the first and the last
    val_tokens: Count = 10_485_760  # validation tokens, always the first ones
    val_row_tokens: Kind(int, 1, 2**24) = 262_144  # length of a row in validation
    # model
    layers: Kind(int, 1, 1000) = 11  # blocks
    heads: Count = 6  # attention heads
    width: Kind(int, 2, 2**20) = 768  # channels of the residual stream
    window: ByStage = (384, 896, 1408, 1664)  # tokens a query looks back; half as many in paired layers
    window_short: ByStage = (128, 384, 640, 768)  # the same in short layers
    window_final: Whole = 2560  # long window of the last validation; 0: as in training
    short_layers: Layers = (0, 1, 2, 4, 5, 7, 8, 9)  # layers with the short window
    paired_layers: Layers = (0, 2, 5, 9)  # layers whose heads attend in pairs
    attention_free: Layers = (6,)  # layers with an MLP only
    attention_source: Layers = (7,)  # layer whose output feeds all later attention
    xsa_layers: Layers = (1, 3, 4, 7, 8, 10)  # layers whose heads leave out the token's own value
    qk_norm: Flag = True  # normalise queries and keys
    attention_scale: Number = 0.1  # initial softmax scale; 0: 1 / sqrt(K)
    rotary_base: Kind(float, 1) = 1024 ** (32 / 31)  # base of the rotary frequencies
    rotary_share: Share = 0.5  # share of a head's channels that rotate
    yarn: Whole = 3  # number of window changes that YaRN adapts to; 0: off
    key_offset: Flag = True  # long, unpaired layers: unrotated key channels of the token before
    attention_gates: Flag = True  # a gate on each head's output
    attention_mix: Flag = True  # learned scalars on attention's matrices
    value_layers: Layers = (1, 2, 8, 9, 10)  # layers that add a token embedding to values
    value_gates: Flag = True  # a gate on each head's value embedding
    value_residual: Flag = False  # each layer mixes layer 0's values into its own
    bigram: Whole = 15  # rows of the bigram table / vocabulary; 0: none
    bigram_width: Count = 192  # channels of the bigram table
    bigram_signs: Whole = 8192  # rows of fixed random signs on bigrams; 0: none
    smear: Flag = True  # add to each embedding some of the one before
    mixing: one_of("sublayers", "blocks", "none") = "sublayers"  # where weights mix stream and embedding
    residual_init: Number = 1.1**0.5  # initial weight of the stream in that mixture
    mudd: Flag = True  # last layer and head mix streams by token-dependent weights
    gated_skip: Layers = (3, 6)  # FROM,TO: add FROM's output, gated, before layer TO
    unet_skips: Flag = False  # the first half's outputs go to the second half, mirrored
    rms_epsilon: Number = 2.0**-23  # added to the mean square before its root
    softcap: Cap = (11.5, 15.0, 5.0)  # h,r,s: h tanh((z + s) / r); h = 0: off
    predicted_tokens: Kind(int, 1, 64) = 3  # tokens predicted ahead in stage 0; one less per stage
    prefix_weight: Number = 0.25  # weight of the prefix loss; falls to 0 in stage 1
    tied_until: Kind(float, 0, 0.99) = 2 / 3  # share of the schedule with embedding and head tied
    attention_init: Number = 0.5  # initial std, times sqrt(D), of query, key and value
    output_init: Number = 0.5  # the same, of attention's output
    mlp_init: Number = 0.5  # the same, of the MLP's up matrix
    # optimizers
    muon_lr: Number = 0.023  # Muon's rate, for the matrices of the blocks
    muon_momentum: Decay = 0.95  # momentum in the middle of the run
    muon_momentum_start: Decay = 0.85  # momentum at both ends
    momentum_warmup: Share = 300 / 1375  # first share of the steps: momentum rises
    momentum_cooldown: Share = 50 / 1375  # last share of the steps: momentum falls
    orthogonaliser: one_of("polar-express", "newton-schulz", "none") = "polar-express"  # Muon's iteration
    qk_heads: Whole = 2  # heads that Muon orthogonalises as one matrix, by the gcd with heads; 0: all
    normuon_beta2: Decay = 0.9  # decay of NorMuon's mean squares; 0: off
    muon_decay: Number = 1.2  # Muon's cautious weight decay, times rate squared
    down_scale: Number = 4.0  # factor on updates of the MLP's down matrices
    split_precision: Flag = True  # bfloat16 matrices, their low bits in the optimizer
    adam_embedding: AdamRates = (0.008, 0.5, 0.95, 0.75)  # Adam's rate, betas, decay: untied embedding
    adam_head: AdamRates = (0.008, 0.5, 0.95, 0.75)  # Adam: head, and tied embedding
    adam_tables: AdamRates = (0.6, 0.75, 0.95, 0.025)  # Adam: value and bigram tables
    adam_gates: AdamRates = (0.008, 0.9, 0.99, 0.005)  # Adam: gates; smear, skip, MUDD at part of the rate
    adam_residual: AdamRates = (0.04, 0.9, 0.95, 0.0)  # Adam: weights of the stream
    adam_mixing: AdamRates = (0.008, 0.9, 0.95, 0.0)  # Adam: weights of what is added to the stream
    adam_scalars: AdamRates = (0.04, 0.9, 0.99, 0.0)  # Adam: other scalars
    adam_epsilon: Kind(float, 1e-30) = 1e-10 / 16_384  # added to the root of the mean squares
    adam_every: Count = 2  # steps whose gradients Adam sums for one update; the rest of the last is dropped
    cooldown: Share = 0.6  # last share of the schedule: rates fall to the floor
    rate_levels: Kind(float, 0, 1e6, STAGE_LENGTHS) = (1.0, 1.52, 1.73)  # factor on all rates, by stage
    rate_floor: Number = 0.15  # factor on all rates at the end
    dtype: one_of("auto", "bfloat16", "float32", "float64") = "auto"  # auto: bfloat16 if fast


@dataclass(frozen=True)
class Config(Recipe):
    """A recipe, and where and how it runs, which may change when a run is resumed."""

    train_files: FilePath = "data/fineweb10B/fineweb_train_*.bin"  # training shards, in name order
    val_files: FilePath = "data/fineweb10B/fineweb_val_*.bin"  # validation shards
    out: FilePath = "logs"  # parent of the run's own folder
    save_every: Whole = 0  # updates between checkpoints, rounded up to Adam's; 0: when stopped
    keep: Count = 2  # newest checkpoints to keep
    resume: FilePath = "none"  # none, a checkpoint or run folder, auto: this recipe's newest
    device: one_of("auto", "cpu", "cuda") = "auto"  # auto: the GPU if there is one
    head_dtype: one_of("auto", "float8", "wide") = "auto"  # head's matmuls; auto: float8 on new GPUs
    compile: one_of("auto", "none") = "auto"  # auto: torch.compile on a GPU
    attention_kernel: one_of("triton", "flash") = "triton"  # where compiled; flash: of flash-attn-4
    mlp_kernel: one_of("torch", "quack") = "torch"  # where compiled; quack: ReLU^2 inside the products
    micro_tokens: Whole = 0  # tokens per forward pass, at least a row; 0: 65536 on a GPU, 1024 on a CPU
    recompute: Flag = False  # recompute activations in backward, to save memory
    loss_chunk: Count = 16_384  # tokens whose logits are held at once
    timeout: Kind(int, 1, 86_400) = 300  # seconds to wait for another process


TECHNIQUES = {  # the settings that turn each off; (its records) why it helps
    "unet-skips": {"unet_skips": False},  # (11) late layers see the first half's outputs
    "qk-norm": {"qk_norm": False},  # (before 12) attention's logits stay bounded
    "x0-shortcut": {"mixing": "none"},  # (before 12) deep blocks see the embedding
    "value-residual": {"value_residual": False},  # (before 12) deep blocks see layer 0's values
    "windows": {"window": (1023,)},  # (13 29) short context first is cheap and easy to learn
    "schedule": {  # (13 19 35 39 62 72) rates fall to a floor and stay, momentum falls
        "cooldown": 562 / 1875, "rate_floor": 0.0, "extension": 0.0,
        "momentum_warmup": 500 / 1875, "momentum_cooldown": 0.0},
    "value-embeddings": {"value_layers": ()},  # (14 15 17 63 70) values also hold their token's embedding
    "attention-free": {"attention_free": ()},  # (17) one layer does well without attention
    "half-rotary": {  # (17) half of the channels match by content alone
        "rotary_base": 10_000.0, "rotary_share": 1.0},
    "softcap": {"softcap": (0.0, 1.0, 0.0)},  # (before 12, 18 54) the head's logits stay bounded
    "first-weights": {  # (19 53 64) weights start small, outputs not at zero
        "attention_init": 3**-0.5, "output_init": 0.0, "mlp_init": 3**-0.5},
    "float8-head": {"head_dtype": "wide"},  # (19 51 55) the largest matmuls at twice the speed
    "short-windows": {"short_layers": ()},  # (20) most layers need half the window
    "documents": {  # (26 29 72) rows begin with a document; long documents are cut
        "long_documents": "continue", "document_tokens": (0,)},
    "attention-gates": {"attention_gates": False},  # (28) a head that finds nothing is silent
    "yarn": {  # (31 33) rotary and softmax scale follow the window
        "yarn": 0, "attention_scale": 0.0, "window_final": 0},
    "smear": {"smear": False},  # (34) each token sees the one before without attention
    "polar-express": {"orthogonaliser": "newton-schulz"},  # (38) updates nearer to orthogonal
    "adam-every-other": {"adam_every": 1},  # (39) half of Adam's work and traffic
    "normuon": {"normuon_beta2": 0.0},  # (41 42 46 48 78) the rows of an update are of one size
    "muon-decay": {"muon_decay": 0.0},  # (43) decay acts only where the update shrinks the weight
    "gated-skip": {"gated_skip": ()},  # (45 55) a late layer sees an early output
    "rate-levels": {"rate_levels": (1.0,)},  # (46 53) rates grow with the batch
    "attention-mix": {"attention_mix": False},  # (47 48) values and outputs learn their scale
    "key-offset": {"key_offset": False},  # (49 62) one layer finds what followed a token
    "tied-head": {"tied_until": 0.0},  # (50 51 53 57) embedding and head learn as one, then part
    "multi-token": {"predicted_tokens": 1},  # (53) early training looks further ahead
    "value-gates": {"value_gates": False},  # (55 70) heads weigh their value embedding
    "split-precision": {"split_precision": False},  # (57) matrices move as bfloat16
    "paired-heads": {"paired_layers": ()},  # (58) two heads share their keys
    "bigrams": {"bigram": 0},  # (62) pairs of tokens have an embedding
    "sublayer-mixing": {  # (73) each sublayer weighs stream and addition
        "mixing": "blocks", "residual_init": 1.0},
    "attention-source": {"attention_source": ()},  # (77) late layers attend from one earlier stream
    "paired-orthogonalising": {"qk_heads": 0},  # (80) heads are updated two by two
    "mudd": {"mudd": False},  # (81) the last mixtures depend on the token
    "xsa": {"xsa_layers": ()},  # (82) heads leave out what the token's own value says
    "bigram-signs": {"bigram_signs": 0},  # (83) signs tell bigrams that share a row apart
    "prefix-loss": {"prefix_weight": 0.0},  # (88) early training learns the next token's prefix, too
}


PRESETS = {
    "gpt2": {},
    "five-minute": dict(
        without=TECHNIQUES.keys() - {"unet-skips", "qk-norm", "x0-shortcut", "value-residual", "softcap"},
        steps=1875, tokens_per_step=(524_288,), row_tokens=(65_536,), val_every=125,
        val_row_tokens=65_536, layers=12, value_residual=True, unet_skips=True,
        rms_epsilon=2.0**-7, softcap=(30.0, 30.0, 0.0), muon_lr=0.04, down_scale=1.0,
        adam_embedding=(0.6, 0.9, 0.95, 0.0), adam_head=(0.008, 0.9, 0.95, 0.0),
        adam_mixing=(0.04, 0.9, 0.95, 0.0), adam_scalars=(0.04, 0.9, 0.95, 0.0), adam_epsilon=1e-8),
    "tiny": dict(  # only what pays in a minute on a CPU
        without=(
            "documents", "attention-free", "short-windows", "yarn", "attention-gates", "attention-mix",
            "gated-skip", "multi-token", "tied-head", "first-weights", "rate-levels",
            "attention-source", "mudd", "xsa", "bigram-signs", "prefix-loss", "sublayer-mixing"),
        train_files="data/text/text_train_*.bin", val_files="data/text/text_val_*.bin",
        shuffle=True, document_tokens=(2048,), steps=640, tokens_per_step=(1024,), row_tokens=(128,),
        val_every=40, val_tokens=131_072, val_row_tokens=128, layers=2, heads=2, width=128,
        window=(128,), paired_layers=(0,), value_layers=(0, 1), bigram=16,
        softcap=(30.0, 30.0, 0.0), down_scale=1.0, muon_lr=0.08, muon_momentum=0.8,
        muon_momentum_start=0.8, adam_embedding=(0.6, 0.65, 0.95, 0.0),
        adam_head=(0.008, 0.65, 0.95, 0.0), adam_tables=(0.3, 0.65, 0.95, 0.0), cooldown=0.8),
    "gpt2-medium": dict(  # a larger size of gpt2; not proven
        steps=4740, layers=16, heads=8, width=1024, paired_layers=(0, 3, 7, 14), attention_free=(9,),
        short_layers=(0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 14), value_layers=(1, 2, 13, 14, 15),
        attention_source=(10,), xsa_layers=(1, 2, 4, 5, 6, 8, 10, 11, 12, 13, 15),
        gated_skip=(4, 9), muon_lr=0.015),
    "gpt2-xl": dict(  # about 1.5B parameters; not proven
        steps=20_000, layers=29, heads=12, width=1536, paired_layers=(0, 5, 14, 25),
        attention_free=(16,), short_layers=tuple(i for i in range(29) if i not in (8, 16, 28)),
        value_layers=(1, 2, 26, 27, 28), attention_source=(19,), gated_skip=(8, 16),
        xsa_layers=tuple(i for i in range(1, 29) if i not in (5, 14, 16, 25)), muon_lr=0.01),
}


def turned_off(values, names):
    """`values` with these techniques off: newest first, as newer ones build on older ones."""
    for name in reversed(TECHNIQUES):
        if name in names:
            values = values | TECHNIQUES[name]
    return values


def preset_values(name):
    """The settings of a preset; all others are Config's defaults."""
    values = {"preset": name} | PRESETS[name]
    without = values.pop("without", ())
    return turned_off(values, without) | values


# --------------------------------------------------------------------------------------------------
# Schedules. In: the step, from 0. Out: numbers. Pure functions; lengths are shares of the run.


def value_at(values, stage):
    """The value of this stage; the last one repeats."""
    return values[min(stage, len(values) - 1)]


def stage_borders(config):
    """The first steps of the stages, equal parts of the schedule (#46), and of the extension after
    it; then the end of the run."""
    scheduled = config.steps - round(config.extension * config.steps)
    return [*(round(scheduled * part / STAGES) for part in range(STAGES + 1)), config.steps]


def stage_of(step, config):
    """0, 1, 2, or 3 in the extension. The last validation belongs to the last step's stage."""
    return bisect(stage_borders(config)[1:-1], min(step, config.steps - 1))


def tokens_until(step, config):
    """Training tokens of all steps before `step`."""
    stages = enumerate(pairwise(stage_borders(config)))
    return sum(max(0, min(step, end) - begin) * value_at(config.tokens_per_step, stage)
               for stage, (begin, end) in stages)


def learning_rate_factor(step, config):
    """Factor on all learning rates: the stage's level (#46) or, in the cooldown, a point on the line from
    it to the floor at the end of the schedule (#19)."""
    level = value_at(config.rate_levels, stage_of(step, config))
    end = stage_borders(config)[STAGES]
    begin = int(round((1 - config.cooldown) * end, 6))
    left = min(1.0, max(0, end - step) / max(1, end - begin)) if config.cooldown else 1.0
    return level * left + config.rate_floor * (1 - left)


def momentum_at(step, config):
    """Muon's momentum rises over the first steps (#12) and falls over the last ones (#39)."""
    rise = max(1, round(config.momentum_warmup * config.steps))
    fall = max(1, round(config.momentum_cooldown * config.steps))
    share = min(1.0, step / rise, (config.steps - step) / fall)
    low, high = config.muon_momentum_start, config.muon_momentum
    return low + (high - low) * share


def windows_at(step, config):
    """(long, short) windows. They grow by stage (#29); the last validation sees further
    (#31)."""
    stage = stage_of(step, config)
    final = config.window_final if step == config.steps else 0
    return final or value_at(config.window, stage), value_at(config.window_short, stage)


def stage_left(step, config):
    """The share of its stage that a step has ahead: 1 for a stage's first step."""
    stage = stage_of(step, config)
    begin, end = stage_borders(config)[stage:stage + 2]
    return (end - step) / (end - begin)


def token_weights(step, config):
    """Loss weights of the next token, the one after it, ...: 1, 1/2, 1/4 (#53). Each stage
    predicts one token less than the one before: during a stage, its last weight falls to 0."""
    stage = stage_of(step, config)
    weights = [0.5**ahead for ahead in range(max(1, config.predicted_tokens - stage))]
    if len(weights) > 1 and stage < STAGES:
        weights[-1] *= stage_left(step, config)
    return tuple(weights)


def prefix_weight(step, config):
    """Weight of the loss of the next token's prefix (#88): full in stage 0, falling to 0 in stage 1."""
    return config.prefix_weight * (1.0, stage_left(step, config), 0.0, 0.0)[stage_of(step, config)]


def last_tied_step(config):
    """The last step with embedding and head tied (#53): the first one, from `tied_until` on, in which
    Adam updates. -1: never tied."""
    if not config.tied_until:
        return -1
    last = math.ceil(round(config.tied_until * stage_borders(config)[STAGES], 6))
    return last + (-last - 1) % config.adam_every


class Phase(NamedTuple):
    """The scheduled values that the model needs in one step."""

    stage: int
    windows: tuple[int, int]  # long, short
    token_weights: tuple[float, ...]
    prefix_weight: float
    tied: bool  # embedding and head are one table


def phase_at(step, config):
    return Phase(stage_of(step, config), windows_at(step, config), token_weights(step, config),
                 prefix_weight(step, config), step <= last_tied_step(config))


def head_channels(config):
    """Channels of a head, and how many of them rotary rotates."""
    channels = config.width // config.heads
    return channels, 2 * round(config.rotary_share * channels / 2)


def yarn(stage, config):
    """Rotary frequencies, (n,) float64 in radians per token, and the softmax scale of a stage.

    YaRN (#31): where the window grows from W to W', a frequency of less than one turn within W is
    slowed by W / W', one of more than 32 turns is kept, those between are blended. The softmax
    grows sharper.
    """
    channels, rotary_channels = head_channels(config)
    exponents = torch.arange(0, rotary_channels, 2, dtype=torch.float64) / rotary_channels
    frequencies = config.rotary_base**-exponents
    scale = config.attention_scale or channels**-0.5
    for before in range(min(stage, config.yarn)):
        old, new = value_at(config.window, before), value_at(config.window, before + 1)
        share_kept = ((old * frequencies / (2 * math.pi) - 1) / 31).clamp(0, 1)
        frequencies = frequencies * (old / new + share_kept * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return frequencies, scale


# --------------------------------------------------------------------------------------------------
# Shards to rows. In: files of uint16 tokens. Out: batches of rows on the device. All shards form
# one stream. Only the stream and the recipe decide which tokens form which row: the number of
# processes does not.

MAGIC_AND_VERSION, HEADER_BYTES = [20240520, 1], 1024
GPT2_VOCABULARY, GPT2_SEPARATOR, PREFIXES = 50257, 50256, "prefixes.bin"


class Shard(NamedTuple):
    """A checked file: 256 little-endian int32 (magic, version, tokens, vocabulary, separator), then
    uint16 tokens. Vocabulary 0 means GPT-2's tokens. A document begins with a separator and may go on
    in the next shard."""

    path: str
    tokens: int
    vocabulary: int
    separator: int


def shard_command(path):
    """The command that makes shards like `path`, the name of one or a pattern."""
    folder = re.sub(r"\[([*?[])]", r"\1", os.path.dirname(path)) or "."  # undoes glob.escape
    if folder.endswith("data/fineweb10B"):
        return f"{tool('data/fineweb.py')} 10 --out {shlex.quote(folder)}"
    return f"{tool('data/text.py')} TEXT... --out {shlex.quote(folder)}"


def damaged(path, problem):
    return UserError(f"{path} {problem}; remove it and make it again: {shard_command(path)}")


def open_shard(path):
    """The Shard of a file, its header checked against its size. Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a regular file; shards are given by a pattern in quotes, such as "
                        "--train-files 'data/mine/text_train_*.bin'")
    header = np.fromfile(path, "<i4", 5).tolist()
    if header[:2] != MAGIC_AND_VERSION or len(header) < 5:
        raise UserError(
            f"{path} is no token shard: it begins with {header}, expected {MAGIC_AND_VERSION} and more; "
            f"if it is text: {tool('data/text.py')} {shlex.quote(path)} --out data/mine")
    count, vocabulary, separator = header[2:]
    size = os.path.getsize(path)
    if not vocabulary:  # FineWeb's shards name neither
        vocabulary, separator = GPT2_VOCABULARY, GPT2_SEPARATOR
    if count <= 0 or size != HEADER_BYTES + 2 * count:
        raise damaged(path, f"has {size} bytes, expected {HEADER_BYTES + 2 * count} for {count} tokens")
    if not 0 <= separator < vocabulary <= 65_536:
        raise damaged(path, f"has vocabulary {vocabulary} and separator {separator}, expected at "
                            "most 65536, and a separator within it")
    return Shard(path, count, vocabulary, separator)


def read_tokens(shard, start, count):
    """(count,) uint16. Raises UserError if the file has changed or holds an impossible token."""
    try:
        tokens = np.fromfile(shard.path, "<u2", count, offset=HEADER_BYTES + 2 * start)
    except OSError as error:
        raise damaged(shard.path, f"can no longer be read: {error.strerror}") from None
    if len(tokens) < count:
        raise damaged(shard.path, f"ends after token {start + len(tokens)} of {shard.tokens}")
    if tokens.max(initial=0) >= shard.vocabulary:
        raise damaged(shard.path, f"holds token {tokens.max()} at {start + tokens.argmax()}, beyond "
                                  f"its vocabulary of {shard.vocabulary}")
    return tokens


class TokenStream:
    """The shards of a glob, in name order, as one sequence. Beyond its end it starts over."""

    def __init__(self, pattern):
        """Raises UserError."""
        self.pattern = pattern
        paths = sorted(glob.glob(pattern))
        if not paths:
            small = "; a small model trains on a CPU: ./run.sh --preset tiny" * ("fineweb" in pattern)
            raise UserError(f"no shard matches {pattern}; make some: {shard_command(pattern)}{small}")
        self.shards = [open_shard(path) for path in paths]
        self.vocabulary, self.separator = self.shards[0][2:]
        self.first = [0, *accumulate(shard.tokens for shard in self.shards)]  # where shards begin; the end
        self.tokens = self.first[-1]

    def fingerprints(self, part=""):
        """For each shard, to recognise it on resume: its header, and a checksum of 64 pieces of 2^14
        tokens, which are all of a shard of up to 2^20. part: how names begin."""
        found = {}
        for number, shard in enumerate(self.shards):
            size = min(2**14, shard.tokens)
            checksum = 0
            for start in np.linspace(0, shard.tokens - size, 64, dtype=int):
                checksum = zlib.crc32(read_tokens(shard, start, size), checksum)
            found[f"{part}shard {number}: {Path(shard.path).name}"] = spelled((*shard[1:], checksum))
        return found

    def locate(self, position):
        """The shard of a position, and the position within it."""
        position %= self.tokens
        index = bisect(self.first, position) - 1
        return self.shards[index], position - self.first[index]

    def read(self, position, count):
        """(count,) uint16 tokens, and (count,) bool: where a document starts."""
        tokens, filled = np.empty(count, np.uint16), 0
        while filled < count:
            shard, inside = self.locate(position + filled)
            part = read_tokens(shard, inside, min(count - filled, shard.tokens - inside))
            tokens[filled:filled + len(part)] = part
            filled += len(part)
        starts = tokens == self.separator
        starts[-position % self.tokens::self.tokens] = True  # the stream's first token
        return tokens, starts


def read_prefixes(stream):
    """(vocabulary,) int32: for each token, the token that is its bytes' longest proper
    prefix (#88), or -1. `data/` writes it beside the shards. Raises UserError."""
    path = Path(stream.shards[0].path).with_name(PREFIXES)
    if not path.is_file():
        raise UserError(f"the prefix loss needs {path}; make it: {shard_command(path)}; or give "
                        "--prefix-weight 0")
    prefixes = np.fromfile(path, "<i4")
    count = stream.vocabulary
    if os.path.getsize(path) != 4 * count or prefixes.min() < -1 or prefixes.max() >= count:
        raise damaged(path, f"is not {count} tokens or -1 as int32")
    return prefixes


class Batch(NamedTuple):
    inputs: Tensor  # (R, T) int32
    targets: Tensor  # (R, T) int64: the next token; -1: none
    starts: Tensor  # (R, T) bool: a document begins
    positions: tuple[int, ...] = ()  # of each row in the stream


def row_lengths(stage, config):
    """Tokens of a row, and of its longest document."""
    tokens = value_at(config.row_tokens, stage)
    return tokens, value_at(config.document_tokens, stage) or tokens + 1


def places_in_documents(starts, before=0):
    """(n,) bool -> (n,) int32: how far each token is from its document's first one. The document of
    token 0 has `before` tokens before it."""
    index = np.arange(len(starts), dtype=np.int32)
    return index - np.maximum.accumulate(np.where(starts, index, -before))


def training_row(stream, position, lengths, config):
    """The row that begins at `position`: (T + 1,) uint16, inputs and the last target; (T + 1,)
    bool, where documents start; and the next row's position. lengths: T, and the longest document.
    Every row begins with a document (#29). Documents are cut at the longest length and at the
    row's end; the rest is dropped, or begins a document of its own. A row that passes the stream's
    end may be short, unless data repeats."""
    tokens_of_row, longest = lengths
    count = tokens_of_row + 1
    if config.long_documents == "continue":  # the last target is the next row's first input
        tokens, starts = stream.read(position, count)
        starts |= places_in_documents(starts) % longest == 0
        return tokens, starts, position + tokens_of_row
    row, begins = np.empty(0, np.uint16), np.empty(0, bool)
    end = math.inf if config.repeat else stream.tokens
    span, before = count + count // 2, 0
    while position <= end:  # piece by piece, until the row is full and the next document is found
        tokens, starts = stream.read(position, span)
        place = places_in_documents(starts, before)
        chosen = np.flatnonzero(place < longest)[:count - len(row)]
        row, begins = np.append(row, tokens[chosen]), np.append(begins, place[chosen] == 0)
        after = int(chosen[-1]) + 1 if len(chosen) else 0
        if len(row) == count and starts[after:].any():
            return row, begins, position + after + int(starts[after:].argmax())
        position += span
        span, before = min(2 * span, 2**20), int(place[-1]) + 1
    return row, begins, position


def shuffled_rows(stream, config, lengths, epoch):
    """Positions of all whole rows of the stream, in an epoch's random order."""
    if config.long_documents == "continue":
        positions = range(0, stream.tokens - lengths[0], lengths[0])
    else:
        positions, following = [], 0
        while following < stream.tokens:
            begin, following = following, training_row(stream, following, lengths, config)[-1]
            if following <= stream.tokens:  # else the row wraps past the end
                positions.append(begin)
    return np.random.default_rng((config.seed, epoch)).permutation(positions).tolist()


def step_rows(stream, config, from_step=0):
    """For each step from `from_step` on, yield its rows' (tokens, starts, position), and the position
    after them. Whatever `from_step`, rows come from the stream's start: the warm-up tries later
    steps on the first tokens. With shuffle, an epoch deals out all rows of one length; a stage with another
    length begins a new epoch."""
    position, epoch, left, lengths = 0, 0, [], None
    for step in range(from_step, config.steps):
        stage, rows = stage_of(step, config), []
        if row_lengths(stage, config) != lengths:
            left, lengths = [], row_lengths(stage, config)
        for _ in range(value_at(config.tokens_per_step, stage) // lengths[0]):
            if config.shuffle and not left:
                left = shuffled_rows(stream, config, lengths, epoch)
                epoch += 1
            begin = left.pop() if config.shuffle else position
            tokens, starts, position = training_row(stream, begin, lengths, config)
            rows.append((tokens, starts, begin))
        yield rows, position


def step_batches(stream, config, processes, from_step=0):
    """Yield this process's share of each step's rows: consecutive ones, as many as others have."""
    for rows, _ in step_rows(stream, config, from_step):
        share = len(rows) // processes.world
        mine = rows[processes.rank * share:(processes.rank + 1) * share]
        tokens, starts, positions = zip(*mine, strict=True)
        tokens, starts = (torch.from_numpy(np.stack(part)) for part in (tokens, starts))
        starts = starts[:, :-1].contiguous()  # else its copy to a GPU would block
        yield Batch(tokens[:, :-1].int(), tokens[:, 1:].long(), starts, positions)


def validation_rows(stream, position, rows, row_tokens, end):
    """Consecutive rows, nothing dropped. Inputs from position `end` on have no target."""
    tokens, starts = stream.read(position, rows * row_tokens + 1)
    targets = tokens[1:].astype(np.int64)
    targets[max(0, end - position):] = -1
    parts = tokens[:-1].astype(np.int32), targets, starts[:-1]
    return Batch(*(torch.from_numpy(part).view(rows, row_tokens) for part in parts))


def prefetched(batches, device):
    """Yield the batches on the device. The next one is read while this one is used."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        upcoming = reader.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = reader.submit(next, batches, None)
            if device.type == "cuda":  # queued behind the step before; the host does not wait
                parts = [part.pin_memory().to(device, non_blocking=True) for part in batch[:3]]
                batch = Batch(*parts, *batch[3:])
            yield batch


def holds_run(stream, config):
    """Whether the stream is long enough for the run. If parts of documents are dropped, the rows
    must be packed to know, some 60 million tokens a second."""
    if config.long_documents == "continue":
        return tokens_until(config.steps, config) < stream.tokens
    steps = step_rows(stream, replace(config, shuffle=False))
    return all(position <= stream.tokens for _, position in steps)


# --------------------------------------------------------------------------------------------------
# Masks. In: where documents start, (R, T) bool, and a window. Out: what each query may see. With
# causal attention, whole documents and a sliding window, the keys of query q are one interval
# [first_key[q], q], and first_key never decreases along a row. So the mask is two comparisons, its
# blocks are intervals too, and nothing is T x T. Only attention keeps documents apart: smear, bigrams,
# key offset and targets take the token beside, of whatever document, as in the records.

MASK_BLOCK, SMALL_BLOCK = 128, 64  # sides of the mask's blocks, in tokens


def document_starts(starts):
    """(R, T) bool -> (R, T) int32: where the document of each token starts in its row."""
    position = torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device)
    return (position * starts).cummax(dim=1).values


def first_visible_key(document, window):
    """(R, T) int32 -> (R, T) int32: the first key of each query, at most `window` before it."""
    position = torch.arange(document.shape[1], dtype=torch.int32, device=document.device)
    return torch.maximum(document, position - min(window, len(position)))


def interval_rule(first_key):
    """The mask itself, for FlexAttention: (row, head, query, key) -> may the query see the key?"""
    return lambda row, head, query, key: (first_key[row, query] <= key) & (key <= query)


def block_mask(first_key, size=MASK_BLOCK):
    """(R, T) int32 -> BlockMask of squares of `size`, made on the device without waiting for it.

    Query block i visits key blocks [reach[i], i]. Those in [inside[i], i) are wholly visible; the
    diagonal and those before inside[i] are tested token by token. `reach` and `inside` never
    decrease, so the query blocks of a key block, which the backward pass visits, are intervals
    too, found by bisection.
    """
    rows, tokens = first_key.shape
    block = torch.arange(tokens // size, dtype=torch.int32, device=first_key.device)
    reach = first_key[:, ::size] // size  # (R, N), N = T / size, as all below
    inside = torch.minimum((first_key[:, size - 1::size] + (size - 1)) // size, block)
    diagonal = block.expand(rows, -1).contiguous()
    full_end = torch.searchsorted(inside, diagonal, right=True, out_int32=True)
    partial_end = torch.searchsorted(reach, diagonal, right=True, out_int32=True)

    def listed(begin, end):
        """Intervals -> lengths (R, 1, N) and block numbers (R, 1, N, N)."""
        numbers = (begin[..., None] + block).clamp_(max=len(block) - 1)
        return (end - begin)[:, None], numbers[:, None]

    partial, full = listed(reach - 1, inside), listed(inside, diagonal)
    partial_of_keys, full_of_keys = listed(full_end - 1, partial_end), listed(diagonal + 1, full_end)
    for _, numbers in (partial, partial_of_keys):  # the place before the interval is the diagonal's
        numbers[..., 0] = diagonal[:, None]
    # torch refuses blocks smaller than its own tiles, even where SMALL_TILES, below, replaces both.
    return BlockMask((tokens, tokens), *partial, *full, *partial_of_keys, *full_of_keys,
                     BLOCK_SIZE=(MASK_BLOCK, MASK_BLOCK), mask_mod=interval_rule(first_key))


def span_mask(first_key, block=2 * MASK_BLOCK):
    """(R, T) int32 -> the mask for torch's own attention, where nothing is compiled. For each
    block of queries: its slice, the slice of keys that any of them sees, and
    (R, 1, queries, keys) bool."""
    row, position = (torch.arange(size, device=first_key.device) for size in first_key.shape)
    rule, spans = interval_rule(first_key), []
    for begin in range(0, len(position), block):
        queries = slice(begin, begin + block)  # the last may reach beyond the row
        keys = slice(int(first_key[:, begin].min()), queries.stop)
        visible = rule(row[:, None, None, None], None, position[queries, None], position[keys])
        spans.append((queries, keys, visible))
    return spans


# Options of FlexAttention's kernels for small blocks, by dtype and K. In the three stages of gpt2 they
# visit 75, 85 and 87 % of what they do with blocks of 128 (records/parts.py). On blocks of 128 these tiles
# took 1.62 ms both ways on an H100, torch's own 1.58 (records/2026-11-26_new_recipe_steps_1_h100).
SMALL_TILES = {(torch.bfloat16, 128): {
    "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_stages": 3, "fwd_num_warps": 4,
    "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64,
    "bwd_num_stages": 2, "bwd_num_warps": 4,
    "SPARSE_Q_BLOCK_SIZE": SMALL_BLOCK, "SPARSE_KV_BLOCK_SIZE": SMALL_BLOCK}}


def block_size(config):
    """The side of the mask's blocks in a compiled model that trains: small on Hopper, where their
    tiles were timed."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    kind = getattr(torch, config.dtype), head_channels(config)[0]
    small = hopper and kind in SMALL_TILES and config.attention_kernel == "triton"
    return SMALL_BLOCK if small else MASK_BLOCK


def attention_masks(model, starts, windows):
    """(R, T) bool and the (long, short) windows -> {(short, paired): mask}. In paired layers a
    token has two positions, and the window counts positions."""
    masks, document = {}, document_starts(starts)
    size = block_size(model.config) if torch.is_grad_enabled() else MASK_BLOCK  # validation has long rows
    for short, paired in {(block.short, block.paired) for block in model.blocks if block.attends}:
        starting = document.repeat_interleave(2, dim=1) * 2 if paired else document
        first_key = first_visible_key(starting, windows[short])
        masks[short, paired] = block_mask(first_key, size) if model.compiled else span_mask(first_key)
    return masks


# By attention kernel. FlashAttention compiles its kernels once per name: a name that describes what
# stands around them in a layer would be another for each kind of layer.
COMPILE_OPTIONS = {"triton": {}, "flash": {"triton.descriptive_names": False}}


def attention(query, key, value, mask, kernel="triton"):
    """Softmax attention, all (R, H, T, K); paired heads (R, H / 2, 2 T, K). The query is scaled
    already. mask: from `block_mask` where the model is compiled, else from `span_mask`. kernel: as in
    Config; FlashAttention 4 is another backend of FlexAttention, for the same mask."""
    if isinstance(mask, BlockMask):
        small = mask.kv_indices.shape[-1] * SMALL_BLOCK == query.shape[2]  # BLOCK_SIZE does not tell
        options = SMALL_TILES[query.dtype, query.shape[-1]] if small else {}
        if kernel == "flash":
            options = {"BACKEND": "FLASH"}
        return flex_attention(query, key, value, block_mask=mask, scale=1.0, kernel_options=options)
    return torch.cat([F.scaled_dot_product_attention(
        query[:, :, queries], key[:, :, keys], value[:, :, keys], visible, scale=1.0)
        for queries, keys, visible in mask], dim=2)


# --------------------------------------------------------------------------------------------------
# Model. In: rows, and where their documents start. Out: the last hidden state (R, T, D), which the
# loss takes to logits. Each block adds to the residual stream, (R, T, D). Initial values and sizes
# below are the records'.

GATE_CHANNELS, MLP_RATIO, MUDD_WIDTH = 12, 4, 64
BIGRAM_INIT, VALUE_INIT, EMBEDDING_INIT = 0.05, 0.01, 0.005


def rms_norm(x, epsilon):
    """x / sqrt(mean(x^2) + epsilon) over the last axis. The epsilon is explicit: torch's default for
    bfloat16 changed from 2^-7, which record 12 had, to 2^-23 in January 2025."""
    return F.rms_norm(x, x.shape[-1:], eps=epsilon)


def gate(x, weight):
    """(..., D), (gates, n) or (n,) -> (..., gates, 1) or (..., 1) in (0, 1), from the first n channels
    (#28). Weights of zero give 1/2."""
    return torch.sigmoid(x[..., :weight.shape[-1]] @ weight.to(x.dtype).movedim(-1, 0))[..., None]


def rotary_tables(frequencies, positions, channels, dtype):
    """(n,) float64 radians per token -> cosines and sines by position and channel, (positions, K)
    each. Channels from 2 n on do not rotate: angle 0."""
    position = torch.arange(positions, dtype=torch.float64, device=frequencies.device)
    angle = torch.outer(position, frequencies)
    angle = F.pad(torch.cat((angle, -angle), dim=1), (0, channels - 2 * len(frequencies)))
    return angle.cos().to(dtype), angle.sin().to(dtype)


def for_heads(table, tokens, heads, paired):
    """Table by position -> table by token, (T, 1, K). In paired layers, (T, H, K): the rotation of
    head h of token t is that of position 2 t + h mod 2, while attention has it at 2 t + (h >= H / 2).
    So it is in the record (#58)."""
    if paired:
        return table[:2 * tokens].view(tokens, 2, -1).repeat(1, heads // 2, 1)
    return table[:tokens, None]


def rotary(x, cosine, sine, rotary_channels):
    """Rotary position embedding (RoFormer) of (R, T, H, K): for j < n = rotary_channels / 2, channels j
    and j + n rotate as a pair by their position's angle (half-truncated, #17). The other channels
    are flipped too, but with a sine of 0."""
    across = x.unflatten(-1, (-1, 2, rotary_channels // 2)).flip(-2).flatten(-3) if rotary_channels else x
    return x * cosine + across * sine


def previous(x):
    """(R, T, ...) shifted by one position. Position 0 keeps its own."""
    return torch.cat((x[:, :1], x[:, :-1]), dim=1)


def offset_keys(key, rotary_channels):
    """Partial key offset (#49): the unrotated channels of a key (R, T, H, K) come from the token
    before, so that one layer finds what followed an earlier occurrence of a token."""
    return torch.cat((key[..., :rotary_channels], previous(key[..., rotary_channels:])), dim=-1)


def smear(embedding, weight, gate_weight):
    """Smear (#34): add to each embedding of (R, T, D) a gated share of the one before."""
    share = weight * gate(embedding, gate_weight)
    return embedding + share * F.pad(embedding[:, :-1], (0, 0, 1, 0))


def bigram_rows(tokens, rows):
    """Bigram hash (#62): (R, T) int32 -> the table's row for each token and the one before. As in
    the record, the first token gets the last row, and the second is hashed with the number of that
    row. Products wrap in int32; the remainder is never negative."""
    before = previous(tokens)
    before[:, :2] = rows - 1
    hashed = ((36_313 * tokens) ^ (27_191 * before)) % (rows - 1)
    hashed[:, 0] = rows - 1
    return hashed


def sign_rows(tokens, rows):
    """(R, T) int32 -> the row of signs of each token and the one before (#83); 0 for the first."""
    return (tokens ^ previous(tokens)) % rows


def pad_channels(part, x):
    """(R, T, n) -> as wide as x (R, T, D): zeros after the first n channels."""
    return F.pad(part, (0, x.shape[-1] - part.shape[-1]))


def xsa(out, value, alpha):
    """XSA (#82): each head's output (R, T, H, K) loses tanh(alpha) of its part along the token's own
    value, which the token knows already. alpha (H,)."""
    along = (out * value).sum(-1, keepdim=True) / value.square().sum(-1, keepdim=True).clamp_min(1e-8)
    return out - alpha.tanh().to(out.dtype)[:, None] * along * value


def wide(dtype):
    """At least float32, for scalars, gates and optimizer state."""
    return torch.promote_types(dtype, torch.float32)


def parameter(*shape, dtype, first=0.0, used=True):
    """A parameter filled with `first`; None where its technique is off."""
    return nn.Parameter(torch.full(shape, first, dtype=dtype)) if used else None


def uniform(*shape, spread, draw):
    """float32 of standard deviation `spread` / sqrt(columns), from the generator `draw`."""
    bound = spread * (3 / shape[-1]) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=draw) if spread else torch.zeros(shape)


def compiled_if(compiled, function, **options):
    if not compiled:
        return function
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


def mlp(x, up, down, kernel="torch"):
    """ReLU^2 MLP (Primer), (R, T, D) -> (R, T, D). up and down, transposed: (4 D, D). kernel: as in
    Config."""
    if kernel == "quack" and torch.compiler.is_compiling():
        return FusedMLP.apply(x.flatten(0, 1), up, down).view_as(x)
    return F.linear(x, up).relu().square() @ down


class FusedMLP(torch.autograd.Function):
    """`mlp` of (N, D), N = R T, by quack-kernels: the products apply ReLU^2, and its derivative, to what
    they hold in registers (#59). Saves five passes over (N, 4 D); the hidden layer is computed again,
    not kept."""

    @staticmethod
    def forward(ctx, x, up, down):
        from quack.gemm_interface import gemm_act
        before, hidden = gemm_act(x, up.mT, activation="relu_sq", tuned=False)
        ctx.save_for_backward(x, up, down, before)
        return hidden @ down

    @staticmethod
    def backward(ctx, gradient):
        from quack.gemm_interface import gemm_dact
        x, up, down, before = ctx.saved_tensors
        by_before, hidden = gemm_dact(gradient, down.mT, before, activation="relu_sq", tuned=False)
        return by_before @ up, by_before.mT @ x, hidden.mT @ gradient


class Mudd(nn.Module):
    """Weights that depend on the token (MUDDFormer, #81), computed from the stream."""

    def __init__(self, initial, config, dtype, draw):
        """initial: the weights at first, the same for all tokens, in tuples by purpose. A bias is
        ten times its weight, so that an update of it moves the weight by a tenth."""
        super().__init__()
        self.counts, values = [len(part) for part in initial], sum(initial, ())
        self.mudd_in = nn.Parameter(uniform(MUDD_WIDTH, config.width, spread=3**-0.5, draw=draw).to(dtype))
        self.mudd_out = parameter(len(values), MUDD_WIDTH, dtype=dtype)
        self.mudd_bias = nn.Parameter((10 * torch.tensor(values, dtype=torch.float64)).to(dtype))

    def forward(self, x):
        """(R, T, D) -> weights of (R, T, 1), in tuples as in `initial`."""
        hidden = F.gelu(F.linear(x, self.mudd_in))
        weights = 0.1 * F.linear(hidden, self.mudd_out, self.mudd_bias)
        return [part.split(1, dim=-1) for part in weights.split(self.counts, dim=-1)]


def mixed(x, added, residual, output):
    """residual * x + output * added: the stream and what a sublayer adds. A weight of None is 1."""
    added = added if output is None else output * added
    return (x if residual is None else (residual * x).to(x.dtype)) + added


def by_token(weights, x):
    """Weights () or (n,), for x (R, T, D) -> (T, 1) or (T, n), not rounded to x's dtype: the gradient is
    then summed by token, beside the norm's backward pass, and not in a pass over x of its own."""
    return weights.view(1, -1).expand(x.shape[1], -1)


def weighted_sum(weights, parts):
    """The weighted sum of the parts that are not None."""
    return sum(weight * part for weight, part in zip(weights, parts, strict=True) if part is not None)


class Entrance(nn.Module):
    """From embeddings to the first stream, x0, and to what each layer adds of them later on."""

    def __init__(self, config, dtype):
        super().__init__()
        static = range(config.layers - config.mudd)  # in the last layer, MUDD decides
        attending = [i for i in static if i not in config.attention_free]
        self.x0_layers = {"blocks": [*static], "sublayers": attending, "none": []}[config.mixing]
        self.bigram_layers = [i for i in attending if i > 0 and config.bigram]
        self.epsilon = config.rms_epsilon
        scalar = partial(parameter, dtype=wide(dtype))
        self.x0_mix = scalar(len(self.x0_layers), used=self.x0_layers)
        self.bigram_mix = scalar(  # the first is for x0 itself
            1 + len(self.bigram_layers), first=BIGRAM_INIT, used=config.bigram)
        self.smear_mix = scalar(used=config.smear)
        self.smear_gate = scalar(min(GATE_CHANNELS, config.width), used=config.smear)

    def forward(self, embedding, bigram, signs):
        """Embedding (R, T, D); bigram and signs, (R, T, n) or None -> x0 (R, T, D), where the
        stream begins; the signed bigram; {layer: what is added to the stream, (R, T, D)}."""
        if self.smear_mix is not None:
            embedding = smear(embedding, self.smear_mix, self.smear_gate)
        x0 = rms_norm(embedding, self.epsilon)
        if bigram is not None:
            bigram = bigram if signs is None else bigram * signs
            x0 = x0 + pad_channels(self.bigram_mix[0] * bigram, x0)
        x0_mix = () if self.x0_mix is None else by_token(self.x0_mix, x0).split(1, dim=1)
        injected = {layer: (weight * x0).to(x0.dtype)
                    for layer, weight in zip(self.x0_layers, x0_mix, strict=True)}
        for i, layer in enumerate(self.bigram_layers, 1):
            injected[layer] = injected.get(layer, 0) + pad_channels(self.bigram_mix[i] * bigram, x0)
        return x0, bigram, injected


def final_states(x, mudd, streams, epsilon):
    """From the stream to the head, (R, T, D) -> (R, T, D): MUDD's last mixture, if any, and the norm.
    streams, for MUDD, (R, T, D) or None: x0, attention's source, the one before the last block, the
    first value embedding, the first skip's output."""
    if mudd is not None:
        weights, = mudd(x)
        x = x + weighted_sum(weights, streams)
    return rms_norm(x, epsilon)


class Shared(NamedTuple):
    """What all blocks of a pass share."""

    x0: Tensor  # (R, T, D) where the stream began: embedding, normed, and bigram
    bigram: Tensor | None  # (R, T, n)
    rotary_tables: tuple[Tensor, Tensor]  # (positions, K) each: cosines, sines
    scale: Tensor  # () of the softmax


def skip_sources(config):
    """{layer: the earlier layer whose output is added to it}. One gated skip (#45, #55); or to
    each layer of the second half its mirror image in the first (U-net, #11)."""
    if config.gated_skip:
        source, layer = config.gated_skip
        return {layer: source}
    return {config.layers - 1 - i: i for i in range(config.layers // 2) if config.unet_skips}


class Block(nn.Module):
    """Attention, then MLP: each turns the stream x into residual x + output f(norm(x)). Attention
    then adds `injected`, which Entrance made of x0 and bigram (#73); if mixing is by blocks, x
    becomes residual x + injected before attention, and nothing later. In the last layer MUDD gives
    each token weights of its own (#81). Late layers attend from one earlier stream, not from x (#77).
    A block keeps no layer number, so that layers share compiled graphs."""

    def __init__(self, layer, config, dtype, draw):
        super().__init__()
        self.heads = config.heads
        self.qk_norm = config.qk_norm
        self.epsilon = config.rms_epsilon
        self.attention_kernel, self.mlp_kernel = config.attention_kernel, config.mlp_kernel
        self.attends = layer not in config.attention_free
        self.paired = layer in config.paired_layers
        self.short = layer in config.short_layers
        channels, self.rotary_channels = head_channels(config)
        self.key_offset = config.key_offset and not (self.short or self.paired)
        self.gives_values = config.value_residual and layer == 0
        scalar = partial(parameter, dtype=wide(dtype))
        gate_size = min(GATE_CHANNELS, config.width)

        def matrices(number, rows, *spreads):
            drawn = [uniform(number, rows, config.width, spread=spread, draw=draw) for spread in spreads]
            return nn.Parameter(torch.cat(drawn).to(dtype if config.split_precision else wide(dtype)))

        self.qk = self.vo = None
        if self.attends:  # heads that Muon orthogonalises together share a matrix (#80)
            together = math.gcd(config.heads, config.qk_heads)
            self.qk = matrices(2 * config.heads // together, together * channels, config.attention_init)
            self.vo = matrices(1, config.width, config.attention_init, config.output_init)  # value, output
        self.mlp = matrices(1, MLP_RATIO * config.width, config.mlp_init, 0.0)  # up, down transposed
        # Weights of the stream and of the sublayers' outputs: attention has the first of each, the
        # MLP the last. With mixing by blocks there is only one, of the stream.
        first = config.residual_init
        dynamic = config.mudd and layer == config.layers - 1
        each = [1 + self.attends] if config.mixing == "sublayers" else []
        self.residual = scalar(*each, first=first, used=not dynamic and config.mixing != "none")
        self.output = scalar(*each, first=1.0, used=not dynamic and each)  # multiplied into matrices
        self.mudd = Mudd((  # the initial weights of
            (0.0, 0.0, 0.0),  # x0, source and stream, added to values
            (0.0, 0.0, 0.0),  # the same, added to the stream
            (2.0, 2.0),  # the value embedding, for each half of the heads
            (first, 1.0),  # the stream and attention's output
            (0.0, BIGRAM_INIT),  # x0 and bigram, added after attention
            (first, 1.0),  # the stream and the MLP's output
        ), config, dtype, draw) if dynamic else None
        skipped = layer in skip_sources(config)
        self.skip_mix = scalar(first=-1.5 if config.gated_skip else 1.0, used=skipped)
        self.skip_gate = scalar(gate_size, used=skipped and config.gated_skip)
        self.in_scale = scalar(first=0.5, used=self.attends and config.attention_mix)
        self.out_scale = scalar(first=1.0, used=self.attends and config.attention_mix)
        self.xsa = scalar(config.heads, used=layer in config.xsa_layers)
        self.value_mix = scalar(first=0.5, used=self.attends and config.value_residual and layer > 0)
        self.attention_gate = scalar(config.heads, gate_size, used=self.attends and config.attention_gates)
        self.value_gate = scalar(config.heads, gate_size, used=(
            layer in config.value_layers and config.value_gates and not dynamic))

    def attention_sublayer(self, x, shared, mask, injected, skip, source, value_embedding, first_value):
        """x (R, T, D): the stream. mask: as in `attention`. Each (R, T, D) or None: injected,
        added to the stream; skip, an earlier layer's output; source, which attention reads instead
        of x; value_embedding. first_value: layer 0's values (R, T, H, K) or None. Returns the
        stream; this layer's values if `gives_values`, else None; the weights for
        `mlp_sublayer`."""
        residual = output = value = None
        of_mlp = None, None
        if skip is not None:
            x = x + self.skip_share(shared.x0) * skip
        if self.output is not None:  # attend() puts output[0] on its output matrix
            residual = by_token(self.residual[0], x)
        elif self.residual is not None:  # mixed once, before attention
            x, injected = mixed(x, injected, by_token(self.residual, x), None), None
        normed = rms_norm(x if source is None else source, self.epsilon)
        added = self.added_to_values(normed, value_embedding)
        if self.mudd is not None:
            x, added, injected, (residual, output), of_mlp = self.mix_by_token(x, shared, source, added)
        if self.attends:
            attended, value = self.attend(normed, shared, mask, added, first_value)
            x = mixed(x, attended, residual, output)
        if injected is not None:
            x = x + injected
        return x, value if self.gives_values else None, of_mlp

    def mix_by_token(self, x, shared, source, added):
        """MUDD (#81): all mixing weights of this layer depend on the token. Returns the stream
        (R, T, D); what is added to values (R, T, H, K), and after attention (R, T, D); weights
        (R, T, 1) of the stream and attention's output, then of the stream and the MLP's output."""
        of_values, of_stream, of_halves, of_attention, (of_x0, of_bigram), of_mlp = self.mudd(x)
        streams = shared.x0, source, x
        halves = torch.cat(of_halves, dim=-1).repeat_interleave((self.heads + 1) // 2, dim=-1)
        added = 0 if added is None else halves[..., :self.heads, None] * added
        added = added + weighted_sum(of_values, streams).unflatten(-1, (self.heads, -1))
        injected = of_x0 * shared.x0
        if shared.bigram is not None:
            injected = injected + pad_channels(of_bigram * shared.bigram, x)
        return x + weighted_sum(of_stream, streams), added, injected, of_attention, of_mlp

    def skip_share(self, x0):
        """The weight of `skip`: () or, gated by x0, (R, T, 1) (#45, #55)."""
        if self.skip_gate is None:
            return self.skip_mix
        return 2 * self.skip_mix.sigmoid() * gate(x0, self.skip_gate)

    def added_to_values(self, normed, value_embedding):
        """The value embedding by head, (R, T, H, K), or None (#14). Gates see both inputs (#55, #70)."""
        if value_embedding is None:
            return None
        by_head = value_embedding.unflatten(-1, (self.heads, -1))
        if self.value_gate is None:
            return by_head
        half = self.value_gate.shape[-1] // 2
        seen = torch.cat((normed[..., :half], value_embedding[..., :half]), dim=-1)
        return 2 * gate(seen, self.value_gate) * by_head

    def mlp_sublayer(self, x, residual, output):
        """(R, T, D) -> the stream. Weights of it and of the MLP's output: (R, T, 1) from MUDD, else None."""
        up, down = self.mlp.to(x.dtype).unbind(0)
        if self.output is not None:
            residual = by_token(self.residual[-1], x)
            down = self.output[-1] * down
        return mixed(x, mlp(rms_norm(x, self.epsilon), up, down, self.mlp_kernel), residual, output)

    def attend(self, x, shared, mask, added, first_value):
        """x (R, T, D), normed -> attention's output (R, T, D), and this layer's
        values (R, T, H, K) before anything is added to them. added (R, T, H, K) or
        None: what is added."""
        rows, tokens, width = x.shape
        qkv_weight = torch.cat((self.qk.view(-1, width), self.vo[0])).to(x.dtype)
        out_weight = self.vo[1].to(x.dtype)
        if self.in_scale is not None:  # cheaper on weights than on activations (#47, #48); of queries
            # and keys the norm takes it out again
            qkv_weight, out_weight = self.in_scale * qkv_weight, self.out_scale * out_weight
        if self.output is not None:
            out_weight = self.output[0] * out_weight
        qkv = F.linear(x, qkv_weight).view(rows, tokens, 3 * self.heads, -1)
        query, key, own_value = qkv.chunk(3, dim=2)  # (R, T, H, K) each
        if self.qk_norm:
            query, key = rms_norm(query, self.epsilon), rms_norm(key, self.epsilon)
        tables = [for_heads(table, tokens, self.heads, self.paired) for table in shared.rotary_tables]
        query, key = (rotary(part, *tables, self.rotary_channels) for part in (query, key))
        query, value = query * shared.scale, own_value
        if first_value is not None:
            value = torch.lerp(value, first_value, self.value_mix.to(value.dtype))
        if added is not None:
            value = value + added
        if self.key_offset:
            key = offset_keys(key, self.rotary_channels)
        # Paired (#58): heads h and h + H / 2 of token t are positions 2 t and 2 t + 1 of one head.
        shape = (rows, 2 * tokens, self.heads // 2, -1) if self.paired else value.shape
        parts = (part.reshape(shape).transpose(1, 2) for part in (query, key, value))
        out = attention(*parts, mask, self.attention_kernel).transpose(1, 2).reshape(value.shape)
        if self.xsa is not None:
            out = xsa(out, value, self.xsa)
        if self.attention_gate is not None:
            out = out * gate(x, self.attention_gate)
        return F.linear(out.flatten(2), out_weight), own_value


class GPT(nn.Module):
    """The language model. Parameters: embedding and head (V, D), V padded to a multiple of 64;
    12 D^2 per block, 8 D^2 without attention; tables of value embeddings and of bigrams; gates,
    scalars and MUDD's matrices."""

    def __init__(self, config, vocabulary, prefixes=None, float8=False, compiled=False):
        """Weights are drawn on the CPU from config.seed: the same for every process and device.
        prefixes: (vocabulary,) int, from `read_prefixes`. float8: for the head's matmuls in
        training. compiled: each sublayer by itself, so that layers of a kind share a graph and
        gradients are ready as soon as their layer is done."""
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.dtype = getattr(torch, config.dtype)
        self.float8 = float8
        self.compiled = compiled
        padded = -(-vocabulary // 64) * 64
        width = config.width
        tied = config.tied_until > 0
        draw = torch.Generator().manual_seed(config.seed)
        table = torch.randn(padded, width, generator=draw) * (EMBEDDING_INIT if tied else 1)
        self.embedding = nn.Parameter(table.to(self.dtype))
        self.head = nn.Parameter(table.to(self.dtype, copy=True) if tied
                                 else torch.zeros(padded, width, dtype=wide(self.dtype)))
        self.blocks = nn.ModuleList(Block(i, config, self.dtype, draw) for i in range(config.layers))
        self.value_tables = nn.ParameterList(
            (VALUE_INIT * torch.randn(padded, width, generator=draw)).to(self.dtype)
            for _ in set(config.value_layers))
        channels = min(config.bigram_width, width)
        self.bigram_table = parameter(
            config.bigram * padded, channels, dtype=self.dtype, used=config.bigram)
        signs = 2 * torch.randint(2, (config.bigram_signs, channels), generator=draw) - 1
        self.register_buffer("signs", signs.to(self.dtype) if config.bigram_signs and config.bigram else None)
        self.entrance = Entrance(config, self.dtype)
        initial = (0.0, -0.5, 0.0, 0.0, 0.0),  # of the streams that final_states() takes
        self.mudd = Mudd(initial, config, self.dtype, draw) if config.mudd else None
        frequencies, scales = zip(*(yarn(stage, config) for stage in range(STAGES + 1)), strict=True)
        self.register_buffer("frequencies", torch.stack(frequencies), persistent=False)
        self.register_buffer(
            "scales", torch.tensor(scales, dtype=wide(self.dtype)), persistent=False)
        if prefixes is not None:  # target -1 indexes the last: no prefix
            prefixes = F.pad(torch.as_tensor(prefixes, dtype=torch.int64), (0, 1), value=-1)
        self.register_buffer("prefixes", prefixes, persistent=False)

        self.run_entrance, self.run_attention, self.run_mlp, self.run_final = (
            compiled_if(compiled, part, **COMPILE_OPTIONS[config.attention_kernel]) for part in (
                Entrance.forward, Block.attention_sublayer, Block.mlp_sublayer, final_states))
        self.run_quantised = compiled_if(compiled, quantised)
        self.run_losses = compiled_if(compiled, chunk_losses)
        # Tile sizes are autotuned: 2.2 ms instead of 2.5 on an H100, with torch.sigmoid.
        self.run_gradient = compiled_if(compiled, chunk_gradient, coordinate_descent_tuning=True)
        if compiled:  # a graph per kind of layer, stage, and with gradients or not
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096

    def run_block(self, block, x, *others):
        """One layer -> the stream; its own values or None. others: as in attention_sublayer."""
        x, value, weights = self.run_attention(block, x, *others)
        return self.run_mlp(block, x, *weights), value

    def forward(self, inputs, starts, phase):
        """(R, T) int32, (R, T) bool -> (R, T, D), normed, ready for the head."""
        config = self.config
        masks = attention_masks(self, starts, phase.windows)
        skips = skip_sources(config)
        bigram = signs = None
        run = self.run_block
        if config.recompute and torch.is_grad_enabled():
            run = partial(activation_checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        by_row = sorted_rows(inputs)
        # TableRows, below, is F.embedding with a faster backward pass. The tied table has a second gradient,
        # from the loss.
        embedding = TableRows.apply(self.head if phase.tied else self.embedding, inputs, by_row)
        if config.bigram:
            pairs = bigram_rows(inputs, len(self.bigram_table))
            bigram = TableRows.apply(self.bigram_table, pairs, sorted_rows(pairs))
        if self.signs is not None:
            signs = F.embedding(sign_rows(inputs, len(self.signs)), self.signs)
        x0, bigram, injected = self.run_entrance(self.entrance, embedding, bigram, signs)
        positions = inputs.shape[1] * (2 if config.paired_layers else 1)
        tables = rotary_tables(
            self.frequencies[phase.stage], positions, config.width // config.heads, self.dtype)
        shared = Shared(x0, bigram, tables, self.scales[phase.stage])
        x, outputs, value_tables = x0, {}, iter(self.value_tables)
        source = first_value = first_embedding = None
        for i, block in enumerate(self.blocks):
            before, value_embedding = x, None
            mask = masks.get((block.short, block.paired))  # perhaps None, for a layer without attention
            if i in config.value_layers:
                value_embedding = TableRows.apply(next(value_tables), inputs, by_row)
                if first_embedding is None:
                    first_embedding = value_embedding
            skip = outputs.get(skips.get(i))  # None, unless one ends here
            x, value = run(block, x, shared, mask, injected.pop(i, None), skip, source,
                           value_embedding, first_value)
            if i in skips.values():
                outputs[i] = x
            if i in config.attention_source:  # (#77)
                source = x
            if block.gives_values:
                first_value = value
        skipped = next(iter(outputs.values()), None)
        streams = x0, source, before, first_embedding, skipped
        return self.run_final(x, self.mudd, streams, config.rms_epsilon)

    def loss(self, batch, phase):
        """Two sums (not means) over the batch of cross-entropies in nats, () and at least float32: of all
        weighted targets, for training; of the next tokens alone, to report. Targets cross document
        borders, as in the records."""
        hidden = self(batch.inputs, batch.starts, phase).flatten(0, 1)
        weights = [*phase.token_weights]
        targets = [F.pad(batch.targets[:, k:], (0, k), value=-1) for k in range(len(weights))]
        if phase.prefix_weight and self.prefixes is not None:
            targets.append(self.prefixes[batch.targets])
            weights.append(phase.prefix_weight)
        targets = torch.stack(targets, dim=-1).flatten(0, 1)
        weights = [torch.tensor(weight, dtype=wide(self.dtype)) for weight in weights]
        return ChunkedLoss.apply(hidden, self.head, targets, weights, self)

    def logits(self, hidden):
        """(..., D) -> (..., vocabulary), capped, at least float32."""
        head = self.head[:self.vocabulary].to(hidden.dtype)
        return softcap(F.linear(hidden, head).to(wide(hidden.dtype)), self.config.softcap)[0]


# --------------------------------------------------------------------------------------------------
# Loss. In: hidden states (N, D), N = R T, head (V, D), targets (N, k). Out: the summed cross-entropy. The
# gradients of hidden states and head are computed while a chunk's logits are in memory: full logits
# (6.6 GB for 65,536 tokens) never exist, and no product is done twice.

# Divisors before a cast to float8, by which products are multiplied again (#51, #55): hidden states up
# to 100 and weights up to 1.6 fit into e4m3, gradients up to 96 into e5m2.
HIDDEN_UNIT, HEAD_UNIT, GRADIENT_UNIT = 100 / 448, 1.6 / 448, 0.75 / 448
BIT = math.log(2)  # in nats. Logits in the loss are in bits, as GPUs compute e^x through 2^x


def quantised(x, unit, dtype):
    """(m, n) -> x / unit in float8, and its transpose (n, m) for another product. Values beyond
    float8's range are clipped: a cast would give infinity or NaN."""
    most = torch.finfo(dtype).max
    narrow = (x / unit).clamp(-most, most).to(dtype)
    return narrow, narrow.mT.contiguous()


def product(a, b, unit, dtype, fast=False):
    """(m, k) x (n, k)^T -> (m, n) in `dtype`; of float8, which must be contiguous, times `unit`."""
    if a.dtype.itemsize > 1:
        return (a @ b.mT).to(dtype)
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b.mT, scale_a=one * unit, scale_b=one, out_dtype=dtype,
                            use_fast_accum=fast)


def gpu_sigmoid(x):
    """The sigmoid from 2^x and 1 / sqrt(x), which take a GPU one instruction each; torch.sigmoid compiles
    to more, with a division."""
    return (1 + (x * (-1 / BIT)).exp2()).rsqrt().square()


def softcap(z, cap, unit=1.0):
    """Logits h tanh((z + s) / r), in units of `unit` nats, and their derivative by z, in nats; h = 0: z
    itself. The cap keeps the model from overconfidence (Gemma 2), the shift leaves room for
    unlikely tokens (#54). The tanh is computed by a sigmoid, which is faster on GPUs."""
    height, extent, shift = cap
    if not height:
        return z / unit, 1.0
    s = (gpu_sigmoid if z.is_cuda else torch.sigmoid)(z * (2 / extent) + 2 * shift / extent)
    return 2 * height / unit * s - height / unit, 4 * height / extent * (s - s.square())


def chunk_losses(z, targets, weights, cap):
    """z (n, V), targets (n, k), k weights () -> the weighted loss and the next token's, in nats;
    log2 of the sum of exponentials (n, 1), in bits. Targets of -1 do not count. cap: as in
    `softcap`. Compiled apart from the gradient: one graph would become one kernel, in which
    the transposed copy is slow."""
    logits = softcap(z.to(wide(z.dtype)), cap, BIT)[0]
    bounded = 0 < cap[0] <= 60  # no exponential overflows: no maximum is needed
    highest = 0 if bounded else logits.amax(-1, keepdim=True)
    normaliser = (logits - highest).exp2().sum(-1, keepdim=True).log2() + highest
    chosen = softcap(z.gather(1, targets.clamp_min(0)).to(normaliser.dtype), cap, BIT)[0]
    losses = BIT * ((normaliser - chosen) * (targets >= 0)).sum(0)
    return weighted_sum(weights, losses), losses[0], normaliser


def chunk_gradient(z, normaliser, targets, weights, cap, float8):
    """(n, V), (n, 1), (n, k) -> the gradient of the weighted loss by z, (n, V), and its transpose;
    with `float8`, both quantised."""
    logits, derivative = softcap(z.to(wide(z.dtype)), cap, BIT)
    token = torch.arange(z.shape[1], dtype=torch.int32, device=z.device)
    columns = targets.int().split(1, dim=1)
    counted = sum(weight * (columns[k] >= 0) for k, weight in enumerate(weights))
    gradient = (logits - normaliser).exp2() * counted
    for k, weight in enumerate(weights):
        gradient = torch.where(token == columns[k], gradient - weight, gradient)
    gradient = gradient * derivative
    if float8:
        return quantised(gradient, GRADIENT_UNIT, torch.float8_e5m2)
    gradient = gradient.to(z.dtype)
    return gradient, gradient.mT


class ChunkedLoss(torch.autograd.Function):
    """hidden (N, D), head (V, D), targets (N, k), k weights -> () the sum of all weighted
    cross-entropies, and () that of next tokens, in chunks of config.loss_chunk tokens. The head's
    padding rows take part in the softmax, in validation too, as in the records. Gradients are made
    only for hidden states that ask for them: not in validation."""

    @staticmethod
    def forward(ctx, hidden, head, targets, weights, model):
        config, dtype = model.config, hidden.dtype
        with_gradient = ctx.needs_input_grad[0]
        float8 = model.float8 and with_gradient

        def both_ways(x, unit):
            """x, for products over its last axis, and its transpose, for those over its first."""
            if float8:
                return model.run_quantised(x, unit, torch.float8_e4m3fn)
            return x.to(dtype), x.to(dtype).mT

        head_rows, head_columns = both_ways(head, HEAD_UNIT)
        by_hidden, by_head, total, next_token = [], None, 0, 0
        chunks = zip(hidden.split(config.loss_chunk), targets.split(config.loss_chunk), strict=True)
        for chunk, chunk_targets in chunks:
            z = rows = columns = None  # the memory of the chunk before is free for this one
            hidden_rows, hidden_columns = both_ways(chunk, HIDDEN_UNIT)
            z = product(hidden_rows, head_rows, HIDDEN_UNIT * HEAD_UNIT, dtype, fast=True)
            loss, next_loss, normaliser = model.run_losses(z, chunk_targets, weights, config.softcap)
            total += loss
            next_token += next_loss
            if not with_gradient:
                continue
            rows, columns = model.run_gradient(
                z, normaliser, chunk_targets, weights, config.softcap, float8)
            by_hidden.append(product(rows, head_columns, GRADIENT_UNIT * HEAD_UNIT, dtype))
            part = product(columns, hidden_columns, GRADIENT_UNIT * HIDDEN_UNIT, wide(dtype))
            by_head = part if by_head is None else by_head.add_(part)
        if with_gradient:
            ctx.save_for_backward(torch.cat(by_hidden), by_head.to(head.dtype))
        ctx.mark_non_differentiable(next_token)
        return total, next_token

    @staticmethod
    def backward(ctx, gradient, _):
        by_hidden, by_head = ctx.saved_tensors
        return by_hidden * gradient, by_head * gradient, None, None, None


# --------------------------------------------------------------------------------------------------
# Gradients of tables. In: the gradient of the rows that were looked up, (R T, n). Out: the table's gradient,
# (V, n), with the sums of its rows added in place. Most rows get none, so no (V, n) is made for them.

if triton:
    @triton.jit
    def add_rows_kernel(total, parts, rows, places, begins, runs, width: tl.constexpr,
                        CHANNELS: tl.constexpr, AT_ONCE: tl.constexpr):
        """total[row] += the sum of parts[place] over that row's places, of (V, width) and (R T, width).
        The four tensors between are those of `sorted_rows`. Of n programs each takes every n-th run of
        equal rows, CHANNELS channels of it, AT_ONCE places at a time; no two write to one element."""
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        for run in range(tl.program_id(0), tl.load(runs), tl.num_programs(0)):
            begin, end = tl.load(begins + run), tl.load(begins + run + 1)
            target = total + tl.load(rows + begin).to(tl.int64) * width + channel
            result = tl.load(target, channel < width, 0).to(tl.float32)
            for at in tl.range(begin, end, AT_ONCE, num_stages=3):
                index = at + tl.arange(0, AT_ONCE)
                place = tl.load(places + index, index < end, 0).to(tl.int64)
                inside = (index < end)[:, None] & (channel < width)[None]
                part = tl.load(parts + place[:, None] * width + channel[None], inside, 0)
                result += tl.sum(part.to(tl.float32), 0)
            tl.store(target, result.to(total.dtype.element_ty), channel < width)


def sorted_rows(rows):
    """(R, T) int -> rows, sorted, and their places, (R T,) int32; begins, (R T + 1,) int32: where
    each run of equal rows begins, and R T after the last one; runs, (1,): the number of runs."""
    found, places = rows.flatten().int().sort(stable=True)
    run = F.pad((found[1:] != found[:-1]).cumsum(0), (1, 0))
    numbers = torch.arange(len(found) + 1, device=rows.device)
    return found, places.int(), torch.searchsorted(run, numbers, out_int32=True), run[-1:] + 1


def add_rows(total, parts, by_row):
    """Add parts (R T, n) to the rows of total (V, n), in place. Sums are at least float32: in
    bfloat16, a token that occurs 2,000 times would lose a quarter of its sum. by_row: from
    `sorted_rows`."""
    rows, places, *_ = by_row
    if parts.is_cuda and total.dtype != torch.float64:  # 0.14 ms on an H100, torch's own 0.49
        grid = 4096, triton.cdiv(total.shape[1], 64)  # programs, blocks of channels
        add_rows_kernel[grid](total, parts.contiguous(), *by_row, width=total.shape[1],
                              CHANNELS=64, AT_ONCE=32, num_warps=1)
    else:
        result = total.to(wide(total.dtype))  # total itself, unless it is in bfloat16
        total.copy_(result.index_add_(0, rows, parts[places].to(result.dtype)))


class TableRows(torch.autograd.Function):
    """Embedding lookup: (V, n), (R, T) int -> (R, T, n). Backward adds to the gradient that the table
    has, in training its view of a Group's: a separate one, as large as the table, would be written and
    read for nothing. Autograd then gets none, and calls the table's hook all the same. Not for
    torch.autograd.grad of a table that has a gradient: this part of it would go there, too."""

    @staticmethod
    def forward(ctx, table, rows, by_row):
        ctx.table, ctx.by_row = table, by_row
        return F.embedding(rows, table)

    @staticmethod
    def backward(ctx, gradient):
        known = ctx.table.grad
        total = torch.zeros_like(ctx.table) if known is None else known
        add_rows(total, gradient.flatten(0, 1), ctx.by_row)
        return total if known is None else None, None, None


# --------------------------------------------------------------------------------------------------
# Optimizers. In: gradients of this process's rows. Out: updated parameters, equal on all processes.
# The parameters of a group lie in one tensor. Each process reduces, updates and keeps optimizer
# state for one slice of it.

# torch 2.13 renamed both; 2.11 and 2.12 know the older names only.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group:
    """Parameters of one kind as slices of one tensor, padded so that it divides among processes.
    Parameters and their gradients become views of `weights` and `gradients`.

    An update is reduce (a reduce_scatter of gradients), update (of this process's slice), gather
    (an all_gather of slices). The reduction starts in the backward pass, as soon as the last
    gradient of the group is ready. Muon and Adam say when an update is due.
    """

    def __init__(self, name, axes, parameters, config, processes):
        """axes: how many last axes form a unit, which no slice divides: 2, a matrix; 1, a
        row; 0, a scalar."""
        self.name = name
        self.parameters = parameters
        self.config = config
        self.world = processes.world
        first = parameters[0]
        unit = first.shape[first.dim() - axes:]
        # Each parameter is aligned to 16 bytes: a graph that was compiled for one layer's relies on
        # it, and serves other layers too.
        align = 16 // math.gcd(16, unit.numel() * first.element_size())
        self.slices, self.length = [], 0
        for p in parameters:
            begin = -(-self.length // align) * align
            self.length = begin + p.numel() // unit.numel()
            self.slices.append(slice(begin, self.length))
        share = -(-self.length // self.world)
        self.weights = first.data.new_zeros(share * self.world, *unit)
        self.gradients = torch.zeros_like(self.weights)
        for p, part in zip(parameters, self.slices, strict=True):
            self.weights[part] = p.data.reshape(-1, *unit)
            p.data, p.grad = self.weights[part].view(p.shape), self.gradients[part].view(p.shape)
            p.register_post_accumulate_grad_hook(self.gradient_arrived)
        self.own_slice = slice(processes.rank * share, (processes.rank + 1) * share)
        self.own = self.weights[self.own_slice]
        self.own_gradient = self.gradients if self.world == 1 else torch.zeros_like(self.own)
        self.state_dtype = wide(self.own.dtype)
        self.state, self.pending, self.work = [], set(), None  # state: buffers of this slice
        self.communicates = self.world > 1  # off while each process warms up alone

    def per_unit(self, values, *shape):
        """For each parameter a value of this shape, or one for each of its units -> the values of
        all units in this process's slice; 0 for padding."""
        units = self.own.new_zeros(len(self.weights), *shape, dtype=self.state_dtype)
        for part, value in zip(self.slices, values, strict=True):
            units[part] = units.new_tensor(value)
        return units[self.own_slice]

    def expect_gradients(self):
        """The next backward pass is the step's last: reduce once all its gradients are ready."""
        self.pending = set(self.parameters)

    def gradient_arrived(self, p):
        if p in self.pending:
            self.pending.remove(p)
            if not self.pending:
                self.reduce()

    def reduce(self):
        """Start the reduce_scatter of gradients, unless it has begun."""
        if self.communicates and self.work is None:
            self.work = reduce_scatter(self.own_gradient, self.gradients, async_op=True)

    def gather(self):
        """Start the all_gather of updated slices. The gradients are used up: zero them."""
        self.gradients.zero_()
        if self.communicates:
            self.work = all_gather(self.weights, self.own, async_op=True)

    def wait(self):
        """Wait for what was started last. On a GPU, only later kernels wait, not the host."""
        if self.work is not None:
            self.work.wait()
        self.work = None

    def as_tensor(self, value):
        """A number that changes with the step, as a tensor: a new constant would recompile."""
        return torch.tensor(value, dtype=self.state_dtype)

    def whole(self, buffer):
        """A state buffer gathered from all processes, for a checkpoint that suits any number of them."""
        if self.world > 1:
            full = buffer.new_empty(len(self.weights), *buffer.shape[1:])
            all_gather(full.view(torch.uint8), buffer.view(torch.uint8))  # bytes suit every backend
            buffer = full
        return buffer[:self.length]

    def load(self, buffer, whole):
        """Fill `buffer` with this process's slice of `whole`."""
        if whole.shape != (self.length, *buffer.shape[1:]):
            raise ValueError(f"{self.name} has state of shape {tuple(whole.shape)}")
        part = whole[self.own_slice]  # shorter, where the slice ends in padding
        buffer.zero_()[:len(part)] = part


# Margin on the norm, and coefficients of the quintics a x + b x^3 + c x^5 that drive every singular
# value in (0, 1] near 1. Polar Express (#38): each is optimal for what those before it leave.
ORTHOGONALISERS = {
    "newton-schulz": (1.0, 5 * ((3.4445, -4.7750, 2.0315),)),
    "polar-express": (1.02, tuple(zip(  # a of the five iterations, then b, then c
        (8.156554524902461, 4.042929935166739, 3.8916678022926607,
         3.285753657755655, 2.3465413258596377),
        (-22.48329292557795, -2.808917465908714, -2.772484153217685,
         -2.3681294933425376, -1.7097828382687081),
        (15.878769915207462, 0.5000178451051316, 0.5060648178503393,
         0.46449024233003106, 0.42323551169305323),
        strict=True))),
    "none": (1.0, ()),
}


def orthogonalise(update, kind, dtype):
    """(n, rows, columns) -> the same shape in `dtype`: about U V^T of each matrix U S V^T
    (Muon). The input's scale does not matter: its largest entry divides it first. A zero
    matrix stays zero."""
    margin, quintics = ORTHOGONALISERS[kind]
    x = update / update.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(update.dtype).tiny)
    norm = x.square().sum((-2, -1), keepdim=True).sqrt()
    x = (x / (margin * norm).clamp_min(1)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # products are taken over the long side
    for a, b, c in quintics:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def averaged_axis(matrices):
    """The axis over which NorMuon takes mean squares: by row or, if wider than tall, by column (#80)."""
    return -1 if matrices.shape[-2] >= matrices.shape[-1] else -2


def normuon(update, mean_square, beta2):
    """NorMuon (#41): divide each row by its running root mean square, keep each matrix's norm.
    Matrices (n, rows, columns), mean squares (n, rows, 1); if wider than tall, (n, 1, columns)."""
    square = update.square().mean(averaged_axis(update), keepdim=True)
    mean_square.lerp_(square, 1 - beta2)
    factor = mean_square.clamp_min(1e-10).rsqrt()
    before, after = (part.sum((-2, -1), keepdim=True).sqrt()
                     for part in (square, square * factor.square()))
    return update * (factor * before / after.clamp_min(1e-10))


def join_bits(high, low):
    """bfloat16 and the 16 bits that it lacks, as int16 -> float32 (#57)."""
    return ((high.view(torch.int16).int() << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def split_bits(x):
    """float32 -> bfloat16, cut towards zero, and the 16 bits cut off: the inverse of join_bits."""
    bits = x.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), ((bits << 16) >> 16).to(torch.int16)


def muon_update(weight, gradient, scale, rate, momentum, decay, beta2, kind, dtype,
                average, mean_square, low_bits=None):
    """Muon in place: Nesterov momentum in average form (#15), orthogonalised, rows equalised.
    Weight decay, by the rate squared, acts only where the update shrinks the weight or is 0
    (cautious, #43). All (n, rows, columns), except mean_square (one axis is 1), scale (n, 1, 1),
    rate and momentum (). low_bits only of bfloat16 weights. kind, dtype: as in `orthogonalise`."""
    gradient = gradient.to(average.dtype)
    average.mul_(momentum).add_(gradient * (1 - momentum))
    nesterov = average * momentum + gradient * (1 - momentum)
    update = orthogonalise(nesterov, kind, dtype).to(average.dtype)
    if beta2:
        update = normuon(update, mean_square, beta2)
    old = weight if low_bits is None else join_bits(weight, low_bits)
    new = old - scale * rate * (update + decay * rate * old * (update * old >= 0))
    if low_bits is not None:
        new, low = split_bits(new)
        low_bits.copy_(low)
    weight.copy_(new)


def adam_update(weight, gradient, mean, mean_square, settings, factor, count, epsilon):
    """Adam in place, in at least float32; epsilon is added after bias correction and root.
    settings: (units, 4), rate, beta1, beta2, decay of each. Decay, by the rate squared, is cautious
    (#50), and 0 where the update is."""
    rate, beta1, beta2, decay = settings.view(-1, 4, *[1] * (weight.dim() - 1)).unbind(1)
    rate, gradient, old = rate * factor, gradient.to(mean.dtype), weight.to(mean.dtype)
    mean.lerp_(gradient, 1 - beta1)
    mean_square.lerp_(gradient.square(), 1 - beta2)
    root = (mean_square / (1 - beta2**count)).sqrt() + epsilon
    update = rate * (mean / (1 - beta1**count)) / root
    weight.copy_(old - update - rate.square() * decay * old * (update * old > 0))


class Muon(Group):
    """Matrices of one shape, orthogonalised as one batch. State: average of gradients, mean squares
    of rows or columns, and the low bits of bfloat16 weights."""

    def __init__(self, name, axes, parameters, scales, model, processes):
        """scales: for each parameter, factors on the updates of its matrices, in turn."""
        super().__init__(name, axes, parameters, model.config, processes)
        self.dtype = model.dtype
        self.kernel = compiled_if(model.compiled, muon_update)
        average = torch.zeros_like(self.own, dtype=self.state_dtype)
        self.state = [average, average.mean(averaged_axis(average), keepdim=True)]  # zeros
        if self.weights.dtype == torch.bfloat16:
            self.state.append(torch.zeros_like(self.own, dtype=torch.int16))
        self.scale = self.per_unit(scales)[:, None, None]

    def is_due(self, _step):
        return True

    def update(self, step):
        config = self.config
        rate = self.as_tensor(config.muon_lr * learning_rate_factor(step, config))
        momentum = self.as_tensor(momentum_at(step, config))
        self.kernel(self.own, self.own_gradient, self.scale, rate, momentum, config.muon_decay,
                    config.normuon_beta2, config.orthogonaliser, self.dtype, *self.state)


class Adam(Group):
    """Tables by row, small parameters by element. State: mean and mean square of the gradients.
    bfloat16 weights are rounded in each update. If the last step is not due, Adam makes no last
    update. Both as in the records."""

    def __init__(self, name, axes, parameters, settings, model, processes):
        """settings: rate, beta1, beta2, decay of each parameter."""
        super().__init__(name, axes, parameters, model.config, processes)
        self.settings = self.per_unit(settings, 4)
        self.kernel = compiled_if(model.compiled, adam_update)
        self.state = [torch.zeros_like(self.own, dtype=self.state_dtype) for _ in range(2)]

    def is_due(self, step):
        """After every `adam_every` steps, whose gradients add up (#39)."""
        return (step + 1) % self.config.adam_every == 0

    def update(self, step):
        factor = self.as_tensor(learning_rate_factor(step, self.config))
        count = self.as_tensor((step + 1.0) // self.config.adam_every)
        self.kernel(self.own, self.own_gradient, *self.state, self.settings, factor, count,
                    self.config.adam_epsilon)


def optimizer_groups(model, processes):
    """All parameters, each in one group, in the order of updates: first those whose gradients come
    first; the tables, which take longest to send, before half of Muon's arithmetic."""
    config, members = model.config, {}
    factors = {"mlp": (MLP_RATIO**0.5, config.down_scale), "qk": (1.0,), "vo": (1.0,)}  # on updates
    for name, p in model.named_parameters():
        words = name.split(".")
        kind = name if words[-1].isdigit() else words[-1]  # a value table is a kind of its own
        if kind in factors:
            kind += ".late" if int(words[1]) >= config.layers // 2 else ".early"
        members.setdefault(kind, []).append(p)

    early, late = ({f"{kind}.{depth}": factors[kind] for kind in factors} for depth in ("early", "late"))
    tables = {name: config.adam_tables for name in reversed(members) if "value_tables" in name}
    gates, mixing, scalars = config.adam_gates, config.adam_mixing, config.adam_scalars
    rate, *betas, decay = gates
    slow = rate / 4, *betas, decay
    single = {  # kinds with a group of their own: Adam's settings, or Muon's factors
        "head": config.adam_head, **late, **tables, "bigram_table": config.adam_tables,
        "embedding": config.adam_embedding, **early}
    plan = {name: {name: settings} for name, settings in single.items()} | {
        "small": {
            "attention_gate": gates, "value_gate": gates, "residual": config.adam_residual,
            "output": mixing, "x0_mix": mixing, "bigram_mix": mixing, "xsa": mixing, "in_scale": scalars,
            "out_scale": scalars, "value_mix": scalars, "smear_mix": scalars, "skip_mix": scalars,
            "smear_gate": (0.01 * rate, *betas, 0.0), "skip_gate": (0.05 * rate, *betas, 0.0)},  # (#55)
        "mudd": {"mudd_in": slow, "mudd_out": slow, "mudd_bias": (rate / 4, *betas, 0.0)}}
    groups = {}
    for name, kinds in plan.items():
        found = [(p, settings) for kind, settings in kinds.items() for p in members.pop(kind, ())]
        if found:
            optimizer = Muon if name in early | late else Adam
            axes = 2 if optimizer is Muon else 1 if name in single else 0
            groups[name] = optimizer(name, axes, *zip(*found, strict=True), model, processes)
    assert not members, f"parameters without a group: {[*members]}"
    if processes.world > 1:
        for group in groups.values():
            dist.broadcast(group.weights, 0)  # other machines may round otherwise
    return groups


def untie(groups):
    """Split embedding and head (#53): the embedding starts as a copy of the head, moments too."""
    head, embedding = groups["head"], groups["embedding"]
    embedding.weights.copy_(head.weights)
    for moment, original in zip(embedding.state, head.state, strict=True):
        moment.copy_(original)


def apply_updates(groups, step):
    """Update these groups. The communication of one overlaps the arithmetic of another."""
    for group in groups:
        group.reduce()
    for group in groups:
        group.wait()
        group.update(step)
        group.gather()
    for group in groups:
        group.wait()


# --------------------------------------------------------------------------------------------------
# One step, one validation. In: batches on the device. Out: updated parameters; losses in nats.


def rows_at_once(config, row_tokens, device):
    most = config.micro_tokens or (65_536 if device.type == "cuda" else 1024)
    return max(1, most // row_tokens)


def micro_batches(batch, config):
    """This process's rows in equal parts, as large as config.micro_tokens allows."""
    rows, row_tokens = batch.inputs.shape
    most = rows_at_once(config, row_tokens, batch.inputs.device)
    size = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= most)
    return [Batch(*parts) for parts in zip(*(part.split(size) for part in batch[:3]), strict=True)]


def train_step(model, groups, batch, step):
    """Forward, backward, and the updates that are due. Returns this process's part of the loss of the
    next token, () on the device: the parts of all processes add up to the mean over all tokens.

    The gradient is that of the summed loss, divided in all stages by the first stage's batch: it
    grows with the batch, while Adam's moments go on (#46).
    """
    config, phase = model.config, phase_at(step, model.config)
    due = [group for name, group in groups.items() if group.is_due(step)
           and not (phase.tied and name == "embedding")]  # the head is the embedding, too
    total, micros = 0, micro_batches(batch, config)
    for micro in micros:
        if micro is micros[-1]:
            for group in due:
                group.expect_gradients()
        loss, next_token_loss = model.loss(micro, phase)
        (loss / config.tokens_per_step[0]).backward()  # adam_epsilon is meant for this size
        total += next_token_loss / value_at(config.tokens_per_step, phase.stage)
    apply_updates(due, step)
    if step == last_tied_step(config):
        untie(groups)
    return total


@torch.no_grad()
def validate(model, stream, tokens, step, processes):
    """Mean cross-entropy of the next token over the first `tokens` targets of the stream.
    Processes take rows in turn; the sum is divided once, so that their number does not matter."""
    config, row_tokens, device = model.config, model.config.val_row_tokens, processes.device
    phase = phase_at(step, config)._replace(token_weights=(1.0,), prefix_weight=0.0)
    rows = rows_at_once(config, row_tokens, device)
    turn = rows * row_tokens
    positions = range(processes.rank * turn, tokens, processes.world * turn)
    batches = (validation_rows(stream, begin, rows, row_tokens, tokens) for begin in positions)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in prefetched(batches, device):
        total += model.loss(batch, phase)[1]
    if processes.world > 1:
        dist.all_reduce(total)
    return total.item() / tokens


def warm_up(model, groups, data, processes):
    """Compile everything in throw-away steps of every stage, restore every number, return the
    seconds it took. The processes of a machine compile a part each; then all find these kernels on
    disk. From here on a recompilation is an error: none can hide in the timed region."""
    begin = time.perf_counter()
    config, device = model.config, processes.device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    torch.compiler.set_stance("default")
    backup = [(tensor, tensor.to("cpu", copy=True))  # on the CPU: the GPU's peak is logged
            for group in groups.values() for tensor in (group.weights, group.gradients, *group.state)]
    borders = stage_borders(config)  # from the last, the run's end, no step is left: validation only
    # First each process by itself, then all of them the same steps, which connects them. From the fourth
    # process on, an earlier one has the same graphs: it compiles all forward graphs first, the later one
    # each backward graph right after its forward graph, and they meet in the middle; so in the updates.
    for together, begins in ((False, [borders[local % len(borders)]]), (True, borders)):
        shared = not together and local >= STAGES
        torch._functorch.config.force_non_lazy_backward_lowering = shared
        in_turn = dict(reversed(groups.items())) if shared else groups
        for group in groups.values():
            group.communicates = together and group.world > 1
        for border in begins:
            batches = prefetched(step_batches(data.train, config, processes, border), device)
            for step, batch in enumerate(islice(batches, config.adam_every), border):
                train_step(model, in_turn, batch, step)
            validate(model, data.val, 1, border, Processes(0, 1, device))
        processes.barrier()
    for tensor, original in backup:
        tensor.copy_(original)
    torch.compiler.set_stance("fail_on_recompile")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return time.perf_counter() - begin


# --------------------------------------------------------------------------------------------------
# The loop. In: a Config. Out: a trained model, in the folder of its run.


class Data(NamedTuple):
    train: TokenStream
    val: TokenStream
    val_tokens: int
    prefixes: np.ndarray | None  # (vocabulary,) int32
    fingerprints: dict  # of the shards, by name


class Progress(NamedTuple):
    """Where a run stands: besides weights and optimizer state, all that resuming needs. The data's
    order needs no state, as the stream is read again from its start."""

    step: int = 0  # updates done
    seconds: float = 0.0  # of training
    val_loss: float = math.nan  # the last one


def open_data(config):
    """Open and check all data. Raises UserError before anything is computed or written."""
    train, val = TokenStream(config.train_files), TokenStream(config.val_files)
    encodings = {shard[2:]: shard.path for shard in train.shards + val.shards}
    if len(encodings) > 1:
        raise UserError(f"shards differ in (vocabulary, separator): {encodings}; encode all alike")
    for stream, least in ((train, max(config.row_tokens) + 1), (val, 2)):
        if stream.tokens < least:
            raise UserError(f"{stream.pattern} has {stream.tokens} tokens, expected {least} or more; make "
                            f"more: {shard_command(stream.pattern)}")
    if not config.repeat and not holds_run(train, config):
        cut = config.long_documents == "drop"
        raise UserError(f"{train.pattern} has {train.tokens:,} tokens, too few for the "
                        f"{tokens_until(config.steps, config) + 1:,} that the run reads"
                        f"{' besides the cut parts of documents' * cut}; make more "
                        f"({shard_command(train.pattern)}), or give --repeat true, or fewer --steps"
                        + ", or --long-documents continue" * cut)
    for stage in range(STAGES + 1) if config.shuffle else ():  # if any row fits, the first does
        lengths = row_lengths(stage, config)
        if training_row(train, 0, lengths, config)[-1] > train.tokens:
            raise UserError(f"{train.pattern} has no whole row of {lengths[0]} tokens to "
                            f"shuffle; make more ({shard_command(train.pattern)}), or give a shorter "
                            "--row-tokens, or --shuffle false")
    trained, validated = train.fingerprints("train "), val.fingerprints("val ")
    for name, facts in validated.items():
        if facts in trained.values():
            raise UserError(f"{name} is among --train-files, too, or a copy of it is; "
                            "give other shards for one of them")
    prefixes, fingerprints = None, trained | validated
    if config.prefix_weight:
        prefixes = read_prefixes(train)
        fingerprints[PREFIXES] = spelled(zlib.crc32(prefixes))
    return Data(train, val, min(config.val_tokens, val.tokens - 1), prefixes, fingerprints)


def training_loop(model, groups, data, processes, log, progress, received):
    """The remaining steps, with their validations and checkpoints. Raises UserError for
    numbers that are not finite; after a signal, which `received` holds, SystemExit with 128
    + its number."""
    config, first, val_loss = model.config, progress.step, progress.val_loss
    save_every = -(-config.save_every // config.adam_every) * config.adam_every  # when Adam has updated
    batches = step_batches(data.train, config, processes)
    for _ in range(first):  # skip the steps done, before the clock runs
        next(batches)
    batches = prefetched(batches, processes.device)
    clock = Clock(processes, progress.seconds, time.perf_counter())
    reports = Reports(groups, data.train, processes, log, clock)
    for step in range(first, config.steps + 1):
        may_save = first < step < config.steps and step % config.adam_every == 0
        stopping = may_save and reports.signal > 0
        saving = stopping or may_save and save_every > 0 and step % save_every == 0
        validating = not stopping and (
            step % (config.val_every or config.steps) == 0 or step == config.steps)
        if validating or saving:
            reports.read()
            with clock.stopped():
                if validating:
                    val_loss = validate(model, data.val, data.val_tokens, step, processes)
                    if not math.isfinite(val_loss):
                        raise UserError(f"the validation loss after step {step} is {val_loss}")
                    log.record(
                        step, clock.seconds, "val_loss", val_loss, peak_memory_mib=peak_memory(processes))
                progress = Progress(step, clock.seconds, val_loss)
                if saving:
                    save_checkpoint(log, model, groups, data, processes, progress)
                if stopping:
                    log.line(f"stopped by {signal.Signals(reports.signal).name} after step {step} of "
                             f"{config.steps}{log.resume_hint()}")
                    raise SystemExit(128 + reports.signal)
        if step < config.steps:
            batch = next(batches)
            loss = train_step(model, groups, batch, step)
            reports.send(step, batch, loss, received)
    return progress


def train(config, processes):
    """The whole run, which leaves a model in its folder. Returns the folder; None where another process
    writes it. After a signal the run leaves a checkpoint, and raises SystemExit. Raises UserError."""
    config, float8, compiled = for_device(config, processes)
    data = open_data(config)
    processes.check_agreement(texts(config) | data.fingerprints | {
        "script": script_text(), "torch": torch.__version__, "float8": float8})
    saved = checkpoint_to_resume(config, data, processes)
    if saved and "state" not in saved:  # so that a job restarting until done can end
        if processes.rank == 0:
            say(f"this run is finished: {saved['path']}; --resume none starts anew, or give another --out")
        return saved["path"].parent
    with RunLog(config, processes, saved) as log:
        cache = compile_cache(config)
        config = checked_kernels(config, processes, compiled, log)
        log.line(f"{environment(processes)}\n{json.dumps(vars(config))}\n"
                 f"shards {json.dumps(data.fingerprints)}", show=False)
        model = GPT(config, data.train.vocabulary, data.prefixes, float8, compiled)
        model.to(processes.device)
        groups, progress = optimizer_groups(model, processes), Progress()
        describe(model, groups, processes, log)
        check_disk(config, groups, processes)
        if data.val_tokens < config.val_tokens:
            log.line(f"notice: {data.val.pattern} has {data.val_tokens:,} targets only; all are used")
        if saved:
            progress = restore(saved, model, groups)
            log.line(f"resumed after step {progress.step} from {saved['path']}")
        if compiled:
            log.line(f"compiling, untimed: seconds if {cache} holds the code, else minutes")
            seconds = warm_up(model, groups, data, processes)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            log.line(f"compiled in {seconds:.0f} s: {graphs} graphs, besides those backward")
        with caught_signals() as received:
            progress = training_loop(model, groups, data, processes, log, progress, received)
            path = log.folder and save_somewhere(log, "model.pt", contents(model, data, progress))
        processes.barrier()
        log.line(f"final val_loss {progress.val_loss:.4f} nats per token, training time "
                 f"{progress.seconds:.2f} s, {tokens_until(config.steps, config) / progress.seconds:,.0f} "
                 f"tokens/s, peak memory {peak_memory(processes):,.0f} MiB; all of it in {log.folder}\n"
                 f"a sample of it: {tool('evals/sample.py')} {shlex.quote(str(path))}")
    return log.folder


# ==================================================================================================
# PART II: THE MACHINERY. Nothing below is about learning.
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# Command line. In: arguments. Out: a checked Config.


BASIC = ("preset", "train_files", "val_files", "steps", "tokens_per_step", "micro_tokens", "device",
         "out", "save_every", "resume", "seed")
ELSEWHERE = {  # what other trainers call a setting
    "batch_size": "tokens_per_step",
    "total_batch_size": "tokens_per_step",
    "device_batch_size": "micro_tokens",
    "block_size": "row_tokens",
    "seq_len": "row_tokens",
    "sequence_length": "row_tokens",
    "max_iters": "steps",
    "num_iterations": "steps",
    "lr": "muon_lr",
    "learning_rate": "muon_lr",
    "n_layer": "layers",
    "n_head": "heads",
    "n_embd": "width",
    "eval_interval": "val_every",
    "out_dir": "out",
    "dataset": "train_files",
    "max_steps": "steps",
    "context_length": "row_tokens",
    "d_model": "width",
    "weight_decay": "muon_decay"}
HELP = "; python train_gpt2.py --help lists all settings"


def flag(name):
    return "--" + name.replace("_", "-")


def spelled(value):
    """A value as text; inverts `typed`."""
    if type(value) is tuple:
        return ",".join(map(spelled, value)) or "none"
    return str(value).lower() if type(value) is bool else str(value)


def typed(option, text):
    """The value of a setting, from its text. Raises ArgumentTypeError if the setting cannot have it."""
    of, low, high, lengths, choices = option.type
    with contextlib.suppress(KeyError, ValueError):
        if choices:
            return choices[text]
        if of is str:  # a path
            return os.path.expanduser(text)
        values = tuple(map(of, [] if text == "none" else text.split(",")))
        if len(values) in (lengths or [1]) and all(low <= value <= high for value in values):
            return values if lengths else values[0]
    expected = " or ".join(choices) or f"{of.__name__} from {low:g} to {high:g}"
    if lengths:
        expected += f", {lengths[0]} to {lengths[-1]} of them, joined by commas"
    raise argparse.ArgumentTypeError(
        f"found {text:.80}, expected {expected}, such as {spelled(option.default)}")


def texts(config):
    return {name: spelled(value) for name, value in vars(config).items()}


def comments(quote):
    """The comments beside the settings above, by name; with quote='"', beside the techniques."""
    above, _, _ = script_text().partition("\nPRESETS")
    return dict(re.findall(f"^    {quote}([\\w-]+){quote}: .*  # (.*)", above, re.MULTILINE))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message + HELP)


def make_parser():
    notes = comments(quote="")
    techniques = [f"  {name:18} {note}" for name, note in comments(quote='"').items()]
    parser = Parser(
        usage="python train_gpt2.py [--preset NAME] [--SETTING VALUE] ...",
        description=(__doc__ or "").split("\n\nPart I")[0] + "\n\nIn parentheses: the values of gpt2.",
        epilog="\n".join(["techniques:", *techniques]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False)
    basic, others = map(parser.add_argument_group, ("basic settings", "all others"))
    basic.add_argument(
        "--without", metavar="", default=(), type=lambda names: names.split(","),
        help="techniques to turn off, joined by commas")
    for option in fields(Config):
        (basic if option.name in BASIC else others).add_argument(
            flag(option.name), metavar="|".join(option.type.choices),
            type=partial(typed, option),
            help=f"{notes[option.name]} ({spelled(option.default)})")
    return parser


def parse_command_line(arguments):
    """The given settings, on top of those of a preset or of a checkpoint. Raises UserError."""
    given, unknown = make_parser().parse_known_args(arguments)
    if unknown:
        raise UserError(f"unknown option {unknown[0]}{nearest(unknown[0])}{HELP}")
    given = vars(given)
    if [] in given.values():  # what argparse makes of --width=--
        raise UserError(f"-- is no value{HELP}")
    values = base_values(given)
    without = given.pop("without")
    used = [name for name, off in TECHNIQUES.items() if not off.items() <= values.items()]
    for name in without:
        if name not in used:
            raise UserError(f"--without {name}: this recipe has only {', '.join(used)}")
    values = turned_off(values, without)
    for one, other in (("train", "val"), ("val", "train")):  # one pattern gives the other
        if pattern := given.get(f"{one}_files"):
            last = f"{one}(?!.*{one})(?=[^/]*$)"  # in the name of the files
            given.setdefault(f"{other}_files", re.sub(last, other, pattern))
    values |= given
    return check_config(Config(**values))


def nearest(word):
    """A hint at what an unknown option may mean."""
    if not word.startswith("-"):
        return "; patterns of files take quotes"
    name = word.partition("=")[0].strip("-").replace("-", "_")
    for near in difflib.get_close_matches(name, [*ELSEWHERE, *vars(Config())], 1, 0.8):
        return f"; is {flag(ELSEWHERE.get(near, near))} meant?"
    return ""


def base_values(given):
    """What the given settings override: those of a preset, or of the checkpoint to resume, whose path
    given["resume"] becomes."""
    resume = given.get("resume", "none")
    if resume not in ("none", "auto"):
        place = Path(resume)
        files = saved_files(place) if place.is_dir() else [place]
        if not files:
            raise UserError(f"{place} holds no checkpoint and no model.pt; give the folder of a run that has")
        saved = newest(files)
        given["resume"] = str(saved["path"])
        return vars(saved["config"]) | {"out": str(saved["path"].parent.parent)}
    return vars(Config(**preset_values(given.get("preset", "gpt2"))))


def check_config(config):
    """Returns it. Raises UserError if settings contradict each other."""
    skip = config.gated_skip
    channels, rotary_channels = head_channels(config)
    rules = [  # setting, whether it is wrong, what it must be
        ("width", config.width % (2 * config.heads), f"a multiple of twice --heads {config.heads}"),
        ("heads", config.paired_layers and config.heads % 2, "even, for --paired-layers"),
        ("row_tokens", any(size % MASK_BLOCK for size in config.row_tokens), f"multiples of {MASK_BLOCK}"),
        ("val_row_tokens", config.val_row_tokens % MASK_BLOCK, f"a multiple of {MASK_BLOCK}"),
        ("tokens_per_step", any(value_at(config.tokens_per_step, stage) % value_at(config.row_tokens, stage)
                                for stage in range(STAGES + 1)),
         f"multiples of --row-tokens {spelled(config.row_tokens)}"),
        ("gated_skip", skip and (len(skip) != 2 or skip[0] >= skip[1]), "FROM,TO with FROM before TO"),
        ("gated_skip", skip and config.unet_skips, "none, with --unet-skips true"),
        ("attention_free", config.value_residual and 0 in config.attention_free,
         "without layer 0, for --value-residual true"),
        ("attention_source", len(config.attention_source) > 1, "one layer or none"),
        ("attention_free", config.mudd and config.layers - 1 in config.attention_free,
         "without the last layer, for --mudd true"),
        ("attention_free", {*config.value_layers, *config.xsa_layers} & {*config.attention_free},
         "without the layers of --value-layers and --xsa-layers"),
        ("rotary_share", rotary_channels and channels % rotary_channels,
         "of channels that divide a head's"),
        ("softcap", config.softcap[0] < 0 or config.softcap[0] and config.softcap[1] <= 0,
         "of h from 0 and r above 0"),
        ("out", not config.out or config.out != config.out.encode(errors="ignore").decode(),
         "a folder's name, in UTF-8")]
    for option in fields(config):
        if option.type is Layers:
            wrong = max(getattr(config, option.name), default=0) >= config.layers
            rules.append((option.name, wrong, f"below --layers {config.layers}"))
    for name, wrong, right in rules:
        if wrong:
            raise UserError(f"{flag(name)} {spelled(getattr(config, name))} must be {right}")
    return config


# --------------------------------------------------------------------------------------------------
# Processes and devices. In: what torchrun put into the environment. Out: this process's place.


class Processes(NamedTuple):
    rank: int  # of this process; 0 writes the log
    world: int  # how many there are
    device: torch.device  # of this process
    host: dist.ProcessGroup | None = None  # gloo, for Python values and barriers

    def synchronize(self):
        """Wait for the device, so that the host's clock means something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def barrier(self):
        """Wait for every process, half an hour at most: one may be compiling or writing."""
        if self.world > 1:
            dist.monitored_barrier(self.host)

    def gather_values(self, value):
        """Each process's value, by rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.host)
        return values

    def check_agreement(self, facts):
        """Raises UserError, on every process, if a fact differs between two of them."""
        for rank, other in enumerate(self.gather_values(facts)):
            for name in facts | other:
                if other.get(name) != facts.get(name):
                    raise UserError(
                        f"process {rank} has another {name} than process {self.rank}: "
                        f"{other.get(name)!s:.80}, not {facts.get(name)!s:.80}; start all with the same "
                        "files, software and options")


def start_processes(config):
    """Join the process group, if torchrun started several. Raises UserError."""
    device, host, environ = torch.device("cpu"), None, os.environ
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    if config.device == "cuda" and not on_gpu:
        raise UserError("--device cuda: torch sees no GPU here; give --device cpu")
    try:
        rank, world = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
        if not 0 <= rank < world:
            raise ValueError(f"RANK {rank} is not below WORLD_SIZE {world}")
        if on_gpu:
            device = torch.device("cuda", int(environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", device_id=device if on_gpu else None,
                timeout=timedelta(seconds=config.timeout))
            host = dist.new_group(backend="gloo")
    except Exception as error:  # a bad number, CUDA, the network
        raise UserError(
            "cannot start with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and "
            f"{torch.cuda.device_count()} GPUs: {error!r:.300}; start several by torchrun, one for "
            "each GPU; without a GPU give --device cpu") from None
    # Once this is freed, glibc keeps blocks of up to its size for reuse, and returns none to the system.
    torch.empty(31 * 2**20, dtype=torch.uint8)
    return Processes(rank, world, device, host)


def for_device(config, processes):
    """Resolve `auto`: the config with its dtype, whether the head trains in float8, whether the model
    is compiled. Raises UserError for what this device or so many processes cannot do."""
    on_gpu = processes.device.type == "cuda"
    if config.dtype == "auto":
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu
                else torch.cpu._is_avx512_bf16_supported())
        config = replace(config, dtype="bfloat16" if fast else "float32")

    fits = config.dtype == "bfloat16" and config.width % 16 == config.loss_chunk % 16 == 0
    if on_gpu:  # a CPU emulates it, slowly
        fits = fits and torch.cuda.get_device_capability() >= (8, 9)
    float8 = {"float8": True, "wide": False, "auto": on_gpu and fits}[config.head_dtype]
    if float8 and not fits:
        raise UserError(
            "--head-dtype float8 takes a GPU that has it, --dtype bfloat16, --width and "
            "--loss-chunk in multiples of 16; or give --head-dtype wide")

    compiled = (on_gpu and config.compile == "auto" and config.dtype != "float64"
                and config.width // config.heads >= 16)  # narrower heads do not compile

    for stage in range(STAGES + 1):
        rows = value_at(config.tokens_per_step, stage) // value_at(config.row_tokens, stage)
        if rows % processes.world:
            raise UserError(
                f"{processes.world} processes cannot share the {rows} rows of a step; start as many "
                "as divide them, or give other --tokens-per-step")
    return config, float8, compiled


def compile_cache(config):
    """Where torch keeps compiled code: below --out, unless TORCHINDUCTOR_CACHE_DIR says otherwise."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # in a folder of its own
    return os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.abspath(f"{config.out}/compile_cache"))


def check_kernel(name, config, device):
    """Raises what goes wrong if the kernel that the setting `name` asks for cannot run here, or if its
    output or gradients, for random inputs, are not the plain one's up to rounding."""
    importlib.import_module("flash_attn.cute" if name == "attention_kernel" else "quack.gemm_interface")
    torch.compiler.set_stance("default")  # an earlier run of this process may have changed it
    noise = partial(torch.randn, device=device, dtype=getattr(torch, config.dtype),
                    generator=torch.Generator(device).manual_seed(0))
    tokens, width, others = 8 * MASK_BLOCK, config.width, ()
    if name == "attention_kernel":
        function, heads = attention, (1, tokens, config.heads, width // config.heads)
        inputs = [noise(heads).transpose(1, 2) for _ in range(3)]
        others = block_mask(first_visible_key(document_starts(noise(1, tokens) > 2), tokens // 3)),
    else:
        function, matrix = mlp, (MLP_RATIO * width, width)
        inputs = [noise(shape) for shape in ((1, tokens, width), matrix, matrix)]
    inputs = [(0.3 * part).requires_grad_() for part in inputs]
    results = []
    for kernel in (getattr(Config, name), getattr(config, name)):
        run = compiled_if(True, function, **COMPILE_OPTIONS[config.attention_kernel])
        out = run(*inputs, *others, kernel)
        results.append((out, *torch.autograd.grad(out, inputs, out.detach())))
    for plain, found in zip(*results, strict=True):
        if not (found - plain).norm() < 0.02 * plain.norm():
            raise ValueError("it gives other results")


def checked_kernels(config, processes, compiled, log):
    """The config, with plain kernels in place of those of a library that fail in any process."""
    for name in ("attention_kernel", "mlp_kernel"):
        asked, plain, problem = getattr(config, name), getattr(Config, name), ""
        if asked != plain:
            try:
                if not compiled:
                    raise ValueError("the model is not compiled")
                check_kernel(name, config, processes.device)
            except (Exception, SystemExit) as error:  # whatever importing and compiling may raise
                problem = f"{error!r:.200}"
        if problem := max(processes.gather_values(problem)):
            log.line(f"notice: {flag(name)} {plain}, not {asked}: {' '.join(problem.split())}; both "
                     "come with pip install 'flash-attn-4[cu13]==4.0.0b36', for a GPU")
            config = replace(config, **{name: plain})
    return config


# --------------------------------------------------------------------------------------------------
# Log. Process 0 writes <out>/<run>/ with log.txt, metrics.jsonl, checkpoints and model.pt. Text is
# only appended: a resumed run goes on in its folder, and the last record of a step counts.


def say(text):
    """Print, above the bar. A closed stdout ends no run."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")


class RunLog(contextlib.AbstractContextManager):
    """A run's folder, log and progress bar. On processes other than 0 it does nothing. As a context
    manager, it logs what ended the run, and adds to a UserError how to resume."""

    def __init__(self, config, processes, saved):
        """saved: the checkpoint that the run goes on from. Raises UserError."""
        self.config, self.folder, self.checkpoint = config, None, saved and saved["path"]
        if processes.rank > 0:
            return
        folder = Path(config.out, time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2))
        if saved and self.checkpoint.parent.parent.resolve() == folder.parent.resolve():
            folder = self.checkpoint.parent
        folder.mkdir(parents=True, exist_ok=True)
        self.text, self.metrics = (
            open(folder / name, "a", 1, "utf-8", "backslashreplace")
            for name in ("log.txt", "metrics.jsonl"))
        try:
            fcntl.flock(self.text, fcntl.LOCK_EX | fcntl.LOCK_NB)  # till this process ends
        except BlockingIOError:
            raise UserError(
                f"another process writes to {folder}; give another --out, or --resume none") from None
        if not self.text.tell():
            self.text.write(f"{script_text()}\n{'=' * 100}\n")
        self.folder = folder
        self.bar = tqdm(total=config.steps, initial=saved["progress"].step if saved else 0, unit="step",
                        disable=None)

    def __exit__(self, _kind, error, _trace):
        if self.folder:
            self.bar.close()
            if error and type(error) is not SystemExit:  # the loop logs a signal itself
                self.line(f"ended: {one_line(error) or repr(error)}{self.resume_hint()}", show=False)
            with contextlib.suppress(OSError), self.metrics, self.text:
                pass  # closed, also on a full disk
            if line := error and one_line(error):
                raise UserError(line + self.resume_hint())

    def resume_hint(self):
        """How to resume, to end a line on why a run ended."""
        if self.folder and self.checkpoint:
            return f"; resume with --resume={shlex.quote(str(self.checkpoint))}"
        return ""

    def line(self, text, show=True):
        """Write to log.txt, and print."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError):  # a full disk must not end the run
            self.text.write(text + "\n")
        if show:
            say(text)

    def record(self, step, seconds, name, loss, **others):
        """The loss of update number `step`, or after it: to metrics.jsonl, and as a line of speedrun logs."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            self.metrics.write(json.dumps({
                "step": step,
                "tokens": tokens_until(step, self.config),
                name: loss,
                **others,
                "train_time_s": round(seconds, 6)}) + "\n")
        if name == "val_loss" or step % 10 == 0 or step < 10:
            self.line(
                f"step:{step}/{self.config.steps} {name}:{loss:.4f} train_time:{1000 * seconds:.0f}ms "
                f"step_avg:{1000 * seconds / max(1, step):.2f}ms", name == "val_loss" or self.bar.disable)
        self.bar.set_postfix_str(f"{name} {loss:.4f}")
        self.bar.update(step - self.bar.n)


def environment(processes):
    """Versions and hardware, for the log."""
    text = (
        f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"{platform.platform()}, {processes.world} process(es), {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads")
    if processes.rank == 0 and processes.device.type == "cuda":
        text += "\n" + subprocess.getoutput("nvidia-smi")
    return text


def describe(model, groups, processes, log):
    """Log what will be trained, and what it takes."""
    config, size = model.config, 0
    for group in groups.values():
        size += sum(part.nbytes for part in (group.weights, group.gradients, *group.state))
        log.line(
            f"{group.name:14} {sum(p.numel() for p in group.parameters):13,} parameters, "
            f"{type(group).__name__}, {group.weights.dtype}")
    matrices = model.head.numel() + sum(p.numel() for p in model.blocks.parameters())
    flop = 6 * matrices * tokens_until(config.steps, config)
    minutes = ""
    if processes.device.type == "cpu":  # a core does about 20 billion a second
        minutes = f" ({flop / 2e10 / os.cpu_count() / 60:,.1f} minutes here)"
    log.line(
        f"{'all':14} {sum(p.numel() for p in model.parameters()):13,} parameters\n"
        f"{config.preset}: {config.steps} steps of {spelled(config.tokens_per_step)} tokens in "
        f"rows of {spelled(config.row_tokens)}; {processes.world} process(es) on "
        f"{processes.device.type}, {config.dtype}{', head in float8' if model.float8 else ''}\n"
        f"about {flop:.1e} FLOP{minutes}, and {size / 2**20:,.0f} MiB of weights, gradients and "
        "optimizer state, besides activations")


def peak_memory(processes):
    """Peak memory of this process in MiB: allocated on the GPU, or resident on the CPU."""
    if processes.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# --------------------------------------------------------------------------------------------------
# Checkpoints. Written whole or not at all; read, compared with the run, and restored.


def save(path, saved):
    """Atomic: the file gets its name when whole and on disk."""
    unfinished = path.with_name("unfinished.partial")  # what a kill leaves, the next one overwrites
    try:
        with open(unfinished, "wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_disk(config, groups, processes):
    """Raises UserError if --out has no room for the checkpoints and the model."""
    size = 12 * sum(group.weights.numel() for group in groups.values())  # bytes, about
    saves = min(config.keep, config.steps // config.save_every) if config.save_every else 0
    needed = size * (saves + 1)
    if processes.rank == 0 and shutil.disk_usage(config.out).free < needed:
        raise UserError(
            f"{config.out} has no room for {needed / 2**20:,.0f} MiB of checkpoints; "
            "make room, or give another --out")


def save_somewhere(log, name, saved):
    """Save in the run's folder or, if that fails, in the temporary folder. Returns the path."""
    path = log.folder / name
    try:
        save(path, saved)
    except (OSError, RuntimeError) as error:
        path = Path(tempfile.gettempdir(), log.folder.name, name)
        path.parent.mkdir(exist_ok=True)
        save(path, saved)
        log.line(f"{one_line(error)}; saved as {path}")
    return path


def contents(model, data, progress):
    """Weights and plain values, for torch.load(weights_only=True)."""
    return {
        "config": texts(model.config),
        "weights": {name: weight.cpu() for name, weight in model.state_dict().items()},
        "vocabulary": data.train.vocabulary,
        "separator": data.train.separator,
        "shards": data.fingerprints,
        **progress._asdict()}


def save_checkpoint(log, model, groups, data, processes, progress):
    """Save what any number of processes need to resume. Keep the newest, and this one."""
    state = {}
    for name, group in groups.items():
        whole = [group.whole(buffer) for buffer in group.state]
        state[name] = [buffer.cpu() for buffer in whole] if log.folder else None
    if log.folder:
        log.checkpoint = save_somewhere(
            log, f"checkpoint_{progress.step:07}.pt", contents(model, data, progress) | {"state": state})
        others = [path for path in checkpoints(log.checkpoint.parent) if path != log.checkpoint]
        for older in others[::-1][model.config.keep - 1:]:
            with contextlib.suppress(OSError):
                older.unlink()
    processes.barrier()


def checkpoints(folder):
    """Those of a run, oldest first."""
    return sorted(folder.glob(f"checkpoint_{7 * '[0-9]'}.pt"))


def saved_files(*folders):
    """Checkpoints and models of these runs, the newest last: runs by the time of their last file."""
    runs = [[*checkpoints(folder), *folder.glob("model.pt")] for folder in folders]
    runs.sort(key=lambda run: max((file.stat().st_mtime for file in run), default=0))
    return [file for run in runs for file in run]


def read_checkpoint(path, wanted=None):
    """The dictionary in a file of `save`, with path, Config and Progress; tensors are memory-mapped.
    None if its recipe is not `wanted`'s. Raises UserError for any other file."""
    if not os.path.exists(path):
        raise UserError(f"there is no {path}")
    try:
        if not os.path.isfile(path):
            raise ValueError("it is not a regular file")
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type for part in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
            archive.read(archive.namelist()[0])  # data.pkl: checks its CRC; the rest only if settings match
            saved = torch.load(path, weights_only=True, mmap=True)
            for part in (saved["config"], saved["shards"]):
                if any(type(text) is not str for text in (*part, *part.values())):
                    raise ValueError("its settings or shards are not texts")
            config = Config(**{name: typed(Config.__dataclass_fields__[name], text)
                               for name, text in saved["config"].items()})
            if texts(config) != saved["config"]:
                raise ValueError("it is of another version, whose settings are others")
            if wanted and identity(config) != identity(wanted):
                return None
            if part := archive.testzip():
                raise ValueError(f"{part} is damaged")
        progress = Progress(int(saved["step"]), float(saved["seconds"]), float(saved["val_loss"]))
        vocabulary, separator = int(saved["vocabulary"]), int(saved["separator"])
        if not (0 <= progress.step <= config.steps and 0 <= progress.seconds < math.inf
                and 0 <= separator < vocabulary <= 65_536 and config.dtype != "auto"):
            raise ValueError("its step, seconds, vocabulary or dtype are impossible")
        return saved | progress._asdict() | {
            "path": Path(path).absolute(), "config": config, "progress": progress, "vocabulary": vocabulary}
    except Exception as error:  # whatever reading and unpickling may raise
        raise UserError(
            f"cannot use {path} as a checkpoint of this train_gpt2.py: {error!r:.160}; "
            "the log.txt of its run begins with the version that wrote it") from None


def identity(config):
    """The recipe, which must stay the same when a run resumes."""
    return {flag(name): spelled(getattr(config, name)) for name in Recipe.__annotations__}


def newest(paths, wanted=None):
    """The last of these files that is a checkpoint, of `wanted`'s recipe if given, as `read_checkpoint`
    returns it, or None. Says which it passed over. Raises UserError if it finds none, but met files
    that cannot be read."""
    errors = []
    for path in reversed(paths):
        try:
            if saved := read_checkpoint(path, wanted):
                for error in errors:
                    say(f"passed over: {error}")
                return saved
        except UserError as error:
            errors.append(error)
    if errors:
        raise UserError(f"{errors[0]}; --resume none starts from the beginning")
    return None


def checkpoint_to_resume(config, data, processes):
    """The checkpoint that --resume names, or its run's model.pt, or None. Raises UserError for another
    recipe or shards."""
    path = config.resume
    if path == "auto":
        path = "none"
        if processes.rank == 0:
            if found := newest(saved_files(*Path(config.out).glob("*")), config):
                path = found["path"]
            else:
                say(f"no checkpoint of this recipe in {config.out}: starting at step 0")
        path = processes.gather_values(path)[0]
    if path == "none":
        return None
    saved = read_checkpoint(path)
    finished = saved["path"].with_name("model.pt")
    if finished.parent.parent.resolve() == Path(config.out).resolve():  # training again would overwrite it
        with contextlib.suppress(UserError):  # none, or a damaged one
            saved = read_checkpoint(finished)
    theirs = identity(saved["config"]) | saved["shards"]
    ours = identity(config) | data.fingerprints
    for name in theirs | ours:
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"{path} was trained with {name:.80} {theirs.get(name)!s:.80}, not "
                f"{ours.get(name)!s:.80}, or by another version of this script; it resumes with its own "
                "recipe and shards: give those, or --resume none")
    return saved


def restore(saved, model, groups):
    """Load weights and optimizer state, of any number of processes. Raises UserError."""
    try:
        model.load_state_dict(saved["weights"])
        for name, group in groups.items():
            for buffer, whole in zip(group.state, saved["state"][name], strict=True):
                group.load(buffer, whole)
        return saved["progress"]
    except Exception as error:  # whatever missing and misshapen tensors lead to
        raise UserError(f"cannot use {saved['path']}: {error!r:.160}") from None


def load_model(path, device="cpu"):
    """A model for evaluation, and the values saved with it. Raises UserError for any other file."""
    saved = read_checkpoint(path)
    model = GPT(saved["config"], saved["vocabulary"])
    restore(saved, model, {})
    return model.to(device), saved


# --------------------------------------------------------------------------------------------------
# Clock, signals, and what processes tell each other.


@dataclass
class Clock:
    """Seconds of training. It stops while anything else runs, once the device is done."""

    processes: Processes
    seconds: float
    began: float  # when it last started, by time.perf_counter()

    def now(self):
        return self.seconds + time.perf_counter() - self.began

    @contextlib.contextmanager
    def stopped(self):
        self.processes.synchronize()
        self.seconds = self.now()
        yield
        self.processes.synchronize()
        self.began = time.perf_counter()


@contextlib.contextmanager
def caught_signals():
    """Yield a list that receives the number of the first signal, for the loop to stop. A second Ctrl-C
    ends the process at once; other signals may come twice by accident."""
    received, torchrun = [], "TORCHELASTIC_RUN_ID" in os.environ  # which answers Ctrl-C itself

    def note(number, _frame):
        if received:
            if number == signal.SIGINT and not torchrun:
                os._exit(128 + number)
            return
        received.append(number)
        if not torchrun:
            with contextlib.suppress(OSError):  # print() must not be called within print()
                os.write(sys.stderr.fileno(), b"\nstopping after a step or two; a second Ctrl-C ends now\n")

    # The last three are how clusters warn. What nohup ignores stays ignored.
    before = {number: signal.signal(number, note) for number in (
        signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
        if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Reports:
    """What processes tell each other after a step: loss, a sum of their weights, a signal. On a GPU
    the report of a step is read when the next step has been launched, so that nothing waits."""

    groups: dict
    stream: TokenStream
    processes: Processes
    log: RunLog
    clock: Clock
    signal: int = 0
    unread: tuple = ()

    def send(self, step, batch, loss, received):
        """loss: () on the device, this process's part. received: a signal or none."""
        weights = sum(group.own.sum(dtype=loss.dtype) for group in self.groups.values())
        report = torch.stack((loss, weights, loss.new_full((), sum(received))))[None]
        reports = report.repeat(self.processes.world, 1)
        if self.processes.world > 1:
            all_gather(reports, report)
        reports = reports.to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream().record_event() if loss.is_cuda else None
        self.read()
        self.unread = step, batch.positions, reports, arrived
        if not arrived:
            self.read()

    def read(self):
        """Act on the unread report, if any. Raises UserError if a loss or weight is not finite."""
        if not self.unread:
            return
        (step, positions, reports, arrived), self.unread = self.unread, ()
        if arrived:
            arrived.synchronize()
        bad = (~reports.T.isfinite()).nonzero().tolist()  # losses, then weights
        if bad:
            _, rank = bad[0]
            shard, token = self.stream.locate(self.processes.gather_values(positions)[rank][0])
            raise UserError(
                f"the loss of step {step + 1}, or a weight after it, is not finite in process "
                f"{rank}, whose rows begin in {shard.path} at token {token}")
        loss, _, number = reports.T
        self.log.record(step + 1, self.clock.now(), "train_loss", loss.sum().item())
        self.signal = int(number.max())


# --------------------------------------------------------------------------------------------------
# Errors and the entry point.


def one_line(error):
    """Why a run ended; None for a bug, which keeps its traceback."""
    if isinstance(error.__context__, OSError) and type(error) is RuntimeError:
        error = error.__context__  # so torch.save reports a full disk
    text = " ".join(str(error).split())
    known = (  # kind, words in its text, what to say
        (UserError, "", text),
        (KeyboardInterrupt, "", "interrupted before the first step: there was nothing to save"),
        (OSError, "", f"cannot read or write: {text:.300}; make room, mend permissions, or give "
                      "another --out"),
        (RuntimeError, "CUDA.*out of memory",
         "the GPU has too little memory; the same training needs less with --recompute true, less "
         "again with --loss-chunk 2048 --micro-tokens 16384"),
        ((MemoryError, RuntimeError), "^$|allocate|Storage size",
         f"the machine has too little memory: {text:.160}; take a smaller --width or --layers"),
        (RuntimeError, "gloo|monitoredBarrier|NCCL|pair closure",
         "the connection to another process is lost, or it kept silent for --timeout seconds "
         f"({text:.160}); its own error is above or in its machine's output"))
    for kind, words, line in known:
        if isinstance(error, kind) and re.search(words, text):
            return line
    return None


def main(arguments=None):
    """Run the command line. Of an error that all processes meet, process 0 speaks first."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # sizes vary by stage
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    try:
        config = parse_command_line(arguments)
        train(config, start_processes(config))
    except BaseException as error:
        if line := one_line(error):
            if os.environ.get("RANK", "0") != "0":  # torchrun ends the job when process 0 has spoken
                time.sleep(5)
            print(line, file=sys.stderr, flush=True)
            error = SystemExit(1)
        if isinstance(error, SystemExit) and dist.is_initialized():
            os._exit(error.code)  # a normal exit waits for processes that do not answer
        raise error
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
