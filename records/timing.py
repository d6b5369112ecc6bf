"""Where the time and the memory of a configuration go on this machine, and how long its whole run would take.

    python records/timing.py --preset tiny                                  # a CPU
    torchrun --standalone --nproc_per_node=8 records/timing.py              # the hundred-second recipe
    python records/timing.py --memory-only true --recompute true            # memory of one GPU, which need not be there
    python records/timing.py --memory-only true --gpu-memory 24             # and what makes it fit into 24 GiB

Options are those of train_gpt2.py, and --timed-steps N (default 5), --json FILE, --memory-only true|false,
--gpu-memory GIB (default 0: what fits is not looked for). WORLD_SIZE=8 before it means eight of them. Rows come
from --train-files where these exist, else they are made-up GPT-2 tokens. From the middle of each stage, after a step
that is not timed, N steps run as they do in training, and N more with the device waited for between their sections.

Conventions. Matrices and head: 2 FLOP per token and weight forward, 4 backward. Attention: 4 x head width x heads x
keys forward, twice that backward, for the keys that each query truly sees. Recomputation, norms, gates and the block
rounding of masks are no work of the model and count nothing. A byte counts once for each time that it must pass: kept
activations are written forward and read backward, weights are read once per pass.
"""

import contextlib
import functools
import glob
import json
import math
import os
import statistics
import sys
import tempfile
import time
import types
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "data")]
import train_gpt2  # noqa: E402
from text import BYTES, Encoding, write_shard  # noqa: E402
from train_gpt2 import (GPT, GPT2_SEPARATOR, GPT2_VOCABULARY, MASK_BLOCK, ORTHOGONALISERS, PRESETS, Adam,  # noqa: E402
                        Config, Group, Layer, Processes, Refusal, TokenStream, at_least_float32, can_compile,
                        check_processes, compute_dtype, first_visible_key, float8_head, layer_plan,
                        multi_token_weights, open_shard, optimizer_groups, parse_command_line, peak_memory, prefetched,
                        rows_at_once, stage_borders, start_processes, step_batches, tokens_until, train_step, validate,
                        value_at, warm_up, windows_at)

TYPICAL_DOCUMENT = 765  # tokens, the median of web text
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
              "RTX 4090": 165e12}  # dense bfloat16; the first name found in the device's own counts
SECTIONS = ("data", "forward", "loss", "backward", "optimizer", "communication")
MIB = 2**20


# Options and rows.


def take_option(arguments: list[str], name: str, default: str) -> tuple[str, list[str]]:
    """An option of this tool alone: its value, and the arguments without it. Raises Refusal."""
    value, rest, words = default, [], list(arguments)
    while words:
        flag, equals, text = words.pop(0).partition("=")
        if flag.replace("_", "-") != name:
            rest.append(flag + equals + text)
            continue
        if not equals and not words:
            raise Refusal(f"{name} needs a value; for example {name} {default or 'timing.json'}")
        value = text if equals else words.pop(0)
    return value, rest


class Options(NamedTuple):
    """What this tool has beyond the Config."""

    timed_steps: int
    json: str
    memory_only: bool
    gpu_memory: float


def read_options(arguments: list[str]) -> tuple[Options, Config]:
    """Raises Refusal, before anything is computed."""
    steps, arguments = take_option(arguments, "--timed-steps", "5")
    path, arguments = take_option(arguments, "--json", "")
    memory_only, arguments = take_option(arguments, "--memory-only", "false")
    if not steps.isdecimal() or int(steps) < 1:
        raise Refusal(f"--timed-steps {steps} is not a whole number of at least 1; for example --timed-steps 5")
    gpu_memory, arguments = take_option(arguments, "--gpu-memory", "0")
    if not gpu_memory.replace(".", "", 1).isdecimal():
        raise Refusal(f"--gpu-memory {gpu_memory} is not a number of GiB; for example --gpu-memory 24")
    if memory_only not in ("true", "false"):
        raise Refusal(f"--memory-only {memory_only} is not one of true, false; for example --memory-only true")
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
    config = parse_command_line(arguments)
    if int(steps) < config.adam_every:
        raise Refusal(f"--timed-steps {steps} is fewer than --adam-every {config.adam_every}, so that no step with "
                      f"Adam might be timed; the nearest is --timed-steps {config.adam_every}")
    if path:
        try:
            open(path, "a", encoding="utf-8").close()
        except OSError as error:
            raise Refusal(f"cannot write {path}: {error.strerror}; name a writable place with --json FILE") from None
    return Options(int(steps), path, memory_only == "true", float(gpu_memory)), config


def made_up_tokens(count: int, separator: int = GPT2_SEPARATOR) -> np.ndarray:
    """(count,) uint16 tokens, uniform below the separator, with documents of a typical length."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, separator, count, dtype=np.uint16)
    tokens[np.cumsum(draw.geometric(1 / TYPICAL_DOCUMENT, count // TYPICAL_DOCUMENT)) % count] = separator
    return tokens


def vocabulary_of(config: Config) -> tuple[int, int]:
    """(vocabulary, separator) of the training shards; without any, what they will have: bytes for the text of `tiny`,
    else GPT-2's."""
    if paths := sorted(glob.glob(config.train_files)):
        return open_shard(paths[0])[2:4]
    is_text = config.train_files == PRESETS["tiny"]["train_files"]
    return (BYTES.vocabulary, BYTES.separator) if is_text else (GPT2_VOCABULARY, GPT2_SEPARATOR)


def open_rows(config: Config, folder: str) -> tuple[TokenStream, str]:
    """The training shards where there are any, else a made-up one in `folder`; and which of the two."""
    if glob.glob(config.train_files):
        return TokenStream(config.train_files), f"rows of {config.train_files}"
    shard, (vocabulary, separator) = Path(folder) / "shard.bin", vocabulary_of(config)
    write_shard(shard, iter([made_up_tokens(4 * max(config.tokens_per_step) + 1, separator)]),
                Encoding(vocabulary, separator, None))
    kind = "GPT-2 tokens" if vocabulary == GPT2_VOCABULARY else "bytes"
    return TokenStream(str(shard)), (f"made-up {kind} in documents of about {TYPICAL_DOCUMENT}, as no file matches "
                                     f"{config.train_files}")


class Stretch(NamedTuple):
    """Steps [begin, end) that cost the same: a stage, or several that differ in nothing that takes time."""

    stages: tuple[int, ...]
    begin: int
    end: int

    @property
    def name(self) -> str:
        return "-".join(str(stage) for stage in sorted({self.stages[0], self.stages[-1]}))

    def steps(self, count: int, period: int) -> list[int]:
        """So many steps from the middle on, where what changes shortly after a border has changed. Where the stretch is
        shorter it starts over after whole periods, in which the steps with Adam and those without alternate."""
        middle, length = (self.end - self.begin) // 2, self.end - self.begin
        whole = length // period * period or length
        return [self.begin + (middle + i) % (length if middle + count <= length else whole) for i in range(count)]


def stretches(config: Config) -> list[Stretch]:
    """The run in order. Stages without a step are left out."""
    found, last = [], None
    borders = [0, *stage_borders(config), config.steps]
    for stage, (begin, end) in enumerate(zip(borders, borders[1:], strict=False)):
        windows = windows_at(begin, config)[:2 if config.short_layers else 1]
        kind = (value_at(config.tokens_per_step, stage), value_at(config.row_tokens, stage), windows,
                len(multi_token_weights(begin, config)))
        if begin == end:
            continue
        if kind == last:
            found[-1] = Stretch((*found[-1].stages, stage), found[-1].begin, end)
        else:
            found.append(Stretch((stage,), begin, end))
        last = kind
    return found


def stretch_batches(stream: TokenStream, config: Config, stage: int, count: int, processes: Processes):
    """`count` batches of a stage's sizes, from the start of the stream, as training has them."""
    sizes = {name: (value_at(getattr(config, name), stage),) for name in ("tokens_per_step", "row_tokens")}
    return prefetched(step_batches(stream, replace(config, steps=count, **sizes), processes), processes)


# What a step has to do: FLOP and bytes.


def doubled(starts: torch.Tensor) -> torch.Tensor:
    """Where documents start, (R, T) bool, in the 2 T positions of layers whose heads are paired."""
    return torch.stack((starts, torch.zeros_like(starts)), dim=-1).flatten(1)


def visited_keys(config: Config, starts: torch.Tensor, windows: tuple[int, int]) -> int:
    """Keys that the queries of (R, T) rows see, summed over layers and heads, from the masks themselves. Paired layers
    have 2 T positions and half the heads."""
    total, starts = 0, starts & config.document_mask
    for layer, count in Counter(layer[:3] for layer in layer_plan(config)).items():
        attends, short, paired = layer
        if attends:
            rows = doubled(starts) if paired else starts
            position = torch.arange(rows.shape[1], device=rows.device)
            keys = int((position - first_visible_key(rows, windows[short]) + 1).sum())
            total += count * keys * (config.heads // 2 if paired else config.heads)
    return total


class Shapes(NamedTuple):
    """Sizes of a model that was never made: parameters by name, bytes of buffers."""

    parameters: dict
    buffers: int

    def matrices(self) -> int:
        """Weights of the blocks: what Muon trains."""
        return sum(p.numel() for name, p in self.parameters.items() if name.startswith("blocks.") and p.dim() == 3)


@functools.cache
def model_shapes(config: Config, vocabulary: int, dtype: torch.dtype) -> Shapes:
    """Nothing is allocated: the model's own code makes tensors that have shapes but no numbers."""
    with torch.device("meta"):
        model = GPT(config, vocabulary, dtype)
    return Shapes(dict(model.named_parameters()), sum(b.nbytes for b in model.buffers()))


def model_flops(config: Config, shapes: Shapes, tokens: int, keys: int) -> dict[str, float]:
    """FLOP of a step's sections, over `tokens` tokens whose queries see `keys` keys (all layers and heads)."""
    forward = 2 * tokens * shapes.matrices() + 4 * (config.width // config.heads) * keys
    return {"forward": forward, "loss": 6 * tokens * shapes.parameters["head"].numel(), "backward": 2 * forward}


def run_flops(config: Config, shapes: Shapes) -> float:
    """FLOP of the model in all steps, on documents of a typical length."""
    total = 0.0
    for stretch in stretches(config):
        size, stage = value_at(config.row_tokens, stretch.stages[0]), stretch.stages[0]
        starts = torch.from_numpy(made_up_tokens(max(size, 2**18 // size * size)) == GPT2_SEPARATOR).view(-1, size)
        tokens = (stretch.end - stretch.begin) * value_at(config.tokens_per_step, stage)
        keys = visited_keys(config, starts, windows_at(stretch.begin, config)) / starts.numel()
        total += sum(model_flops(config, shapes, tokens, keys * tokens).values())
    return total


def update_flops(groups: list[Group], config: Config) -> float:
    """FLOP of one update of this process's slices: the products of the orthogonalisation, and 16 per number else."""
    total = 0
    for group in groups:
        total += 16 * group.shard.numel()
        if not isinstance(group, Adam):
            count, short, long = len(group.shard), *sorted(group.shard.shape[1:])
            total += len(ORTHOGONALISERS[config.orthogonaliser][1]) * count * (4 * short**2 * long + 2 * short**3)
    return total


def update_bytes(groups: list[Group]) -> float:
    """Weights and state read and written, gradients read and set to zero."""
    return sum(2 * sum(t.nbytes for t in (group.shard, *group.state)) + group.shard_gradient.nbytes
               + group.gradients.nbytes for group in groups)


def step_bytes(config: Config, shapes: Shapes, dtype: torch.dtype, tokens: int, passes: int) -> dict[str, float]:
    """Least traffic of the other sections of one process, see the conventions."""
    kept = tokens * config.width * dtype.itemsize * kept_units(replace(config, recompute=False), True)
    blocks = sum(p.nbytes for name, p in shapes.parameters.items() if name.startswith("blocks."))
    head = shapes.parameters["head"]
    logits = tokens * head.shape[0] * dtype.itemsize
    return {"data": tokens * sum(torch.empty((), dtype=t).itemsize for t in (torch.int32, torch.int64, torch.bool)),
            "forward": kept + passes * blocks, "backward": kept + 3 * passes * blocks,
            # logits: written, read for the normaliser and for the slope, which is written and read by two products
            "loss": 6 * logits + passes * 4 * head.nbytes + 3 * tokens * config.width * dtype.itemsize}


# Memory from shapes alone.


def block_units(layer: Layer, first: bool, config: Config, compiled: bool, widened: bool) -> int:
    """What one layer keeps for its backward pass, in hidden states: numbers per token / width.

    Always: the stream it receives, unless that is the embedding itself; the normed input of the MLP; its hidden
    channels before and after the square. With attention: the normed input; query, key and value from the product (3);
    query and key turned (2); what attention gives, and the same as one matrix (2); the stream after it. A value of its
    own where something is added to it or heads are paired, and that something where a gate weighs it. Without a
    compiler, mixtures and gated outputs are kept too, not recomputed; and where activations are bfloat16 (`widened`) a
    norm keeps its input in float32, for which the product of query, key and value is let go unless the value needs it.
    """
    units = 2 - first + 2 * config.mlp_ratio + (not compiled and config.x0_shortcut)
    if layer.attends:
        valued = layer.table is not None
        units += 9 + (valued or layer.paired or (config.value_residual and not first))
        units += (valued and config.value_gates) + (not compiled and config.attention_gates)
        if widened and config.qk_norm:
            units += 4 - 3 * ((valued or layer.paired) and not config.value_residual)
    return units + widened * (1 + layer.attends)


def kept_units(config: Config, compiled: bool, widened: bool = False) -> int:
    """What a forward pass keeps for backward, in hidden states: the embedding and its norm, bigrams, smear's embedding,
    the layers (see `block_units`; recomputed ones only what they receive), the last norm's input, the slope of its
    output. Skips are made before the layer that takes them, so that compiled or recomputed layers keep them."""
    plan, skips = layer_plan(config), len(config.gated_skip) // 2 + config.unet_skips * (config.layers // 2)
    units = 3 + widened + config.embedding_norm * (1 + widened) + config.second_embedding * (2 + widened)
    units += bool(config.bigram) + config.smear + skips * (compiled or config.recompute)
    if config.recompute:
        return units + config.layers - 1 + sum(layer.table is not None for layer in plan) + 3 * config.value_residual
    return units + sum(block_units(layer, i == 0, config, compiled, widened) for i, layer in enumerate(plan))


def span_numbers(tokens: int, window: int, block: int = 2 * MASK_BLOCK) -> int:
    """Numbers in the span masks of one row, if no document's end makes them fewer."""
    queries = [min(block, tokens - at) for at in range(0, tokens, block)]
    return sum(count * (min(number * block, window) + count) for number, count in enumerate(queries))


def step_sizes(config: Config, stage: int, world: int, device: torch.device) -> tuple[int, int, int]:
    """Of one process: rows of a step, rows in one forward pass, tokens of a row."""
    size = value_at(config.row_tokens, stage)
    rows = value_at(config.tokens_per_step, stage) // size // world
    most = rows_at_once(config, size, device)
    return rows, max(n for n in range(1, rows + 1) if rows % n == 0 and n <= most), size


def stage_memory(config: Config, shapes: Shapes, dtype: torch.dtype, world: int, device: torch.device,
                 stage: int) -> dict[str, int]:
    """What a step of one stage needs beside weights, gradients and state, in bytes; see `predicted_memory`."""
    compiled, plan = device.type == "cuda" and config.compile != "none", layer_plan(config)
    narrow, wide, widened = dtype.itemsize, at_least_float32(dtype).itemsize, not compiled and dtype == torch.bfloat16
    rows, at_once, size = step_sizes(config, stage, world, device)
    unit = at_once * size * config.width * narrow
    head, blocks = shapes.parameters["head"], [p for n, p in shapes.parameters.items() if n.startswith("blocks.")]
    mask_bytes, float_masks, largest = 0, 0, 0
    windows = windows_at([0, *stage_borders(config)][stage], config)
    for layer in plan:
        if not compiled and layer.attends:
            numbers = at_once * span_numbers(size * (2 if layer.paired else 1), windows[layer.short])
            float_masks, largest = float_masks + numbers * narrow, max(largest, numbers * narrow)
    for short, paired in {layer[1:3] for layer in plan if layer.attends}:
        tokens = size * (2 if paired else 1)
        mask_bytes += at_once * (4 * tokens + (4 * 4 * (tokens // MASK_BLOCK) ** 2 if compiled else
                                               span_numbers(tokens, windows[short])))
    # Copies of weights that a pass keeps: cast, or multiplied by a learned scalar.
    copies = 0
    for p in blocks:
        cast = p.dtype != dtype
        scaled = config.attention_mix and p.dim() == 3 and p.shape[0] == 4
        copies += p.numel() * narrow * (cast or scaled)
    kept = unit * kept_units(config, compiled, widened) + (0 if config.recompute else copies + float_masks)
    # The loss: logits in `dtype`, those of a compiled chunk and their slope, else also wide steps of the softcap, the
    # softmax and its slope; the head's gradient, in full and of one chunk, and its copies.
    chunk = min(config.loss_chunk, at_once * size) * head.shape[0]
    loss = chunk * (2 * narrow if compiled else narrow + 5 * wide if widened else 6 * wide)
    loss += head.numel() * (wide + narrow + narrow * (head.dtype != dtype)) + unit
    # Backward of one layer while all is still kept: slopes of the stream, of the MLP's hidden channels and of query,
    # key, value; gradients of its weights; and what is recomputed.
    block = max(sum(p.numel() for n, p in shapes.parameters.items() if n.startswith(f"blocks.{i}."))
                for i in range(config.layers))
    backward = unit * (2 + 2 * config.mlp_ratio) + block * (narrow + wide) + head.nbytes
    if config.recompute:
        backward += largest + unit * max(block_units(layer, i == 0, config, compiled, widened)
                                         for i, layer in enumerate(plan))
    batch = 2 * rows * size * (4 + 8 + 1)
    return {"rows and masks": batch + mask_bytes, "activations": kept, "loss chunk": loss,
            "backward": max(0, backward - loss)}


def validation_memory(config: Config, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> int:
    """What compiled validation needs beside weights, gradients, state and tables, about, in bytes: embedding, its norm,
    the stream, bigrams, a second embedding, values, a skip and a kept output; the MLP's input and hidden channels; a
    chunk of logits."""
    tokens = rows_at_once(config, config.val_row_tokens, device) * config.val_row_tokens
    units = 3 + bool(config.bigram) + config.second_embedding + bool(config.value_layers) + 2 + 1 + 2 * config.mlp_ratio
    chunk = min(config.loss_chunk, tokens) * shapes.parameters["head"].shape[0]
    return tokens * (config.width * units + 4 + 8 + 1) * dtype.itemsize + 2 * chunk * dtype.itemsize


# Trailing axes that stay whole where a group is sliced; 0 for others.
GROUPS = {"head": 1, "embedding": 1, "value_tables": 1, "second_table": 1, "bigram_table": 1}


def group_members(config: Config, shapes: Shapes) -> dict[str, list[torch.Tensor]]:
    """Parameters by the optimizer's group that holds them, as `optimizer_groups` deals them out."""
    members = {}
    for name, p in shapes.parameters.items():
        first, last = name.split(".")[0], name.split(".")[-1]
        group = last if last in ("attention", "mlp") else first if first in GROUPS else "small"
        if config.muon_gates and last in ("attention_gate", "value_gate"):
            group = "gates"
        members.setdefault(group, []).append(p)
    return members


def predicted_memory(config: Config, vocabulary: int, dtype: torch.dtype, world: int, device: torch.device,
                     stages: tuple[int, ...] | None = None) -> dict[str, int]:
    """The peak of one process in bytes, by parts that add up to it, from shapes alone: nothing is allocated.

    weights         parameters, each group padded to divide among the processes; exact
    gradients       as many, and with several processes the slice that is reduced to; exact
    optimizer       this process's slice of the state: Adam two wide numbers per weight; Muon a wide one, averages of
                    rows, and where weights are split 16 bits; settings of single rows; exact
    tables          rotary cosines and sines of all positions; exact
    rows and masks  two batches (one is prefetched) and masks of one forward pass
    activations     what one forward pass keeps for backward: `kept_units` hidden states, and without a compiler masks
    loss chunk      logits of a chunk and their slopes, the head's gradient: while all activations are kept
    backward        what the backward pass of one layer needs beyond the room of the loss chunk
    update          what the largest update needs beyond the room of the three above

    Of `stages` (None: all) the one with the highest sum. Eager sizes are checked on CPUs. Compiled ones come from what
    the same partitioner keeps there; that the GPU's compiler keeps and fuses the same is NOT verified. Validation is
    not part of it (see `validation_memory`), nor are the CUDA context, its libraries (about 1 GiB) and the allocator's
    waste.
    """
    shapes = model_shapes(config, vocabulary, dtype)
    parts = {"weights": 0, "gradients": 0, "optimizer": 0, "tables": shapes.buffers}
    update, compiled = 0, device.type == "cuda" and config.compile != "none"
    for name, members in group_members(config, shapes).items():
        item = 2 if name in ("attention", "mlp", "gates") else GROUPS.get(name, 0)
        shape = members[0].shape[members[0].dim() - item:]
        share = -(-sum(p.shape[:p.dim() - item].numel() for p in members) // world)
        size, wide = shape.numel() * members[0].dtype.itemsize, at_least_float32(members[0].dtype).itemsize
        parts["weights"] += share * world * size
        parts["gradients"] += share * world * size + (share * size if world > 1 else 0)
        if item == 2:
            low = 2 * shape.numel() if members[0].dtype == torch.bfloat16 else 0
            parts["optimizer"] += share * (wide * (shape.numel() + shape[0] + 1) + low)
        else:
            parts["optimizer"] += share * wide * (2 * shape.numel() + 4)
        # Temporaries of the arithmetic; compiled, only what matrix products need exists.
        copies = 3 if item == 2 else 0
        if not compiled:
            copies = 4.25 + 2 * (members[0].dtype.itemsize < wide)  # the quarter: one byte that says whether to decay
        update = max(update, round(share * shape.numel() * wide * copies))
    used = [stage for stretch in stretches(config) for stage in stretch.stages
            if stages is None or stage in stages]
    worst = max((stage_memory(config, shapes, dtype, world, device, stage) for stage in used),
                key=lambda needs: sum(needs.values()))
    room = sum(worst[name] for name in ("activations", "loss chunk", "backward"))
    return {**parts, **worst, "update": max(0, update - room)}


GPU_EXTRA = 3 * 2**29  # CUDA context, libraries and waste of the allocator, about


def peak_bytes(config: Config, vocabulary: int, dtype: torch.dtype, world: int, device: torch.device) -> int:
    """What one GPU has to hold at most, in training or in validation, with all that is not ours."""
    parts = predicted_memory(config, vocabulary, dtype, world, device)
    still = sum(parts[name] for name in ("weights", "gradients", "optimizer", "tables"))
    validating = still + validation_memory(config, model_shapes(config, vocabulary, dtype), dtype, device)
    return max(sum(parts.values()), validating) + GPU_EXTRA


def settings_that_fit(config: Config, vocabulary: int, dtype: torch.dtype, world: int, device: torch.device,
                      capacity: int) -> dict | None:
    """Settings to change so that a GPU of `capacity` bytes holds the same training: none if it does as it is; else
    fewer tokens per pass, if that does not help recomputation too, if that does not help shorter chunks of the loss.
    None if nothing does. A pass holds at least one row."""
    most, least = config.micro_tokens or 65_536, min(config.row_tokens)
    tokens = [config.micro_tokens] + [most >> i for i in range(1, 40) if most >> (i - 1) > least]
    for recompute, chunk in ((config.recompute, config.loss_chunk), (True, config.loss_chunk),
                             (True, min(2048, config.loss_chunk))):
        for micro_tokens in tokens:
            changed = {"micro_tokens": micro_tokens, "recompute": recompute, "loss_chunk": chunk}
            changed = {name: value for name, value in changed.items() if value != getattr(config, name)}
            if peak_bytes(replace(config, **changed), vocabulary, dtype, world, device) <= capacity:
                return changed
    return None


def fit_line(config: Config, vocabulary: int, dtype: torch.dtype, world: int, device: torch.device, capacity: int,
             changes: dict | None) -> str:
    """What `settings_that_fit` found, in words."""
    peak = peak_bytes(config, vocabulary, dtype, world, device)
    line = f"predicted peak memory {peak / 2**30:.1f} GiB per GPU of {capacity / 2**30:.1f} GiB"
    if changes is None:
        return line + ": it will not fit, whatever the settings; take more GPUs or a smaller model"
    if changes:
        options = " ".join(f"{train_gpt2.spelled_flag(name)} {train_gpt2.spelled(value)}"
                           for name, value in changes.items())
        return f"{line}: it will not fit; the same training fits with {options}"
    return line


def free_memory() -> float:
    """Bytes that this machine, or its container, has left; infinite where it does not say."""
    free = math.inf
    with contextlib.suppress(OSError, ValueError):
        meminfo = Path("/proc/meminfo").read_text().split()
        free = 1024 * int(meminfo[meminfo.index("MemAvailable:") + 1])
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))  # "max" without a limit
    return free


# Measured: the machine, a step as it is, a step in sections.


def best_of(times: int, processes: Processes, run) -> float:
    """Seconds of the fastest of several runs, after one that is not timed."""
    seconds = []
    for _ in range(times + 1):
        processes.synchronize()
        begin = time.perf_counter()
        run()
        processes.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def machine_rates(dtype: torch.dtype, processes: Processes) -> tuple[float, float]:
    """FLOP/s of a large product in `dtype`, bytes/s of a large copy."""
    size, count = (8192, 2**29) if processes.device.type == "cuda" else (768, 2**25)
    a, b = (torch.randn(size, size, device=processes.device).to(dtype) for _ in range(2))
    source = torch.zeros(count, dtype=torch.uint8, device=processes.device)
    target = torch.zeros_like(source)
    return (2 * size**3 / best_of(5, processes, lambda: a @ b),
            2 * count / best_of(3, processes, lambda: target.copy_(source)))


def peak_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """The dense bfloat16 peak of the GPU in FLOP/s; None where it is not known, or the arithmetic is another one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and dtype == torch.bfloat16 else ""
    return next((rate for part, rate in PEAK_FLOPS.items() if part in name), None)


class Sections:
    """Seconds by section. A section that begins inside another one pauses it, so that every moment counts once."""

    def __init__(self, device: torch.device):
        self.device, self.names, self.seconds, self.since = device, [], Counter(), 0.0

    def charge(self) -> None:
        """The time since the last call goes to the innermost section. Only the stream of the arithmetic is waited for:
        a reduction that runs beside it shows when somebody waits for it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        now = time.perf_counter()
        if self.names:
            self.seconds[self.names[-1]] += now - self.since
        self.since = now

    @contextmanager
    def section(self, name: str):
        self.charge()
        self.names.append(name)
        try:
            yield
        finally:
            self.charge()
            self.names.pop()

    @contextmanager
    def watching(self):
        """The step's own code reports to the sections meanwhile; nothing in it is rewritten for that."""
        def timed(function, name: str):
            def run(*arguments, **named):
                with self.section(name):
                    return function(*arguments, **named)
            return run

        with ExitStack() as stack:
            for owner, function, name in (
                    (train_gpt2, "attention_masks", "forward"), (GPT, "forward", "forward"), (GPT, "loss", "loss"),
                    (torch.Tensor, "backward", "backward"), (train_gpt2, "apply_updates", "optimizer"),
                    (Group, "reduce", "communication"), (Group, "wait", "communication"),
                    (train_gpt2, "all_gather", "communication")):
                stack.enter_context(mock.patch.object(owner, function, timed(getattr(owner, function), name)))
            yield


def kind_of(groups: dict[str, Group], step: int) -> str:
    """Steps of one kind cost the same: those in which Adam updates, and the others."""
    return "with Adam" if any(isinstance(g, Adam) and g.is_due(step) for g in groups.values()) else "without"


def whole_steps(model: GPT, groups: dict[str, Group], batches, steps: list[int], processes: Processes):
    """Yield (kind, {"step": seconds}) of steps as training has them: the device is one step behind, at most."""
    on_gpu, marks = processes.device.type == "cuda", []

    def mark() -> None:
        marks.append(torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter())
        if on_gpu:
            marks[-1].record()

    for number, step in enumerate(steps):  # the first one is not timed
        train_step(model, groups, next(batches), step)
        mark()
        if on_gpu and number:
            marks[-2].synchronize()
    processes.synchronize()
    for step, before, after in zip(steps[1:], marks, marks[1:], strict=False):
        yield kind_of(groups, step), {"step": before.elapsed_time(after) / 1000 if on_gpu else after - before}


def sectioned_steps(model: GPT, groups: dict[str, Group], batches, steps: list[int], processes: Processes):
    """Yield (kind, seconds by section, their sum beside them) of steps that wait between their sections."""
    for step in steps:
        sections = Sections(processes.device)
        with sections.watching(), sections.section("rest"):
            with sections.section("data"):
                batch = next(batches)
            train_step(model, groups, batch, step)
        yield kind_of(groups, step), {**{name: 0.0 for name in SECTIONS}, **sections.seconds,
                                      "in sections": sum(sections.seconds.values())}


def averaged(measured: list[tuple[str, dict]], counts: Counter) -> dict[str, float]:
    """Means over a stretch of `counts` steps of each kind, from medians within the kinds."""
    kinds = {kind for kind, _ in measured} & set(counts)
    total, names = sum(counts[kind] for kind in kinds), measured[0][1]
    return {name: sum(counts[kind] * statistics.median(values[name] for which, values in measured if which == kind)
                      for kind in kinds) / total for name in names}


def summed(values: list[float], processes: Processes) -> list[float]:
    """Sums over the processes."""
    total = torch.tensor(values, dtype=torch.float64, device=processes.device)
    if processes.world > 1:
        dist.all_reduce(total)
    return total.tolist()


def measure_stretch(stretch: Stretch, model: GPT, groups: dict[str, Group], stream: TokenStream, timed_steps: int,
                    processes: Processes, shapes: Shapes, dtype: torch.dtype, rates: dict) -> dict:
    """All figures of one stretch of the run; per step and over all processes where nothing else is said."""
    config, stage, device = model.config, stretch.stages[0], processes.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    counts = Counter(kind_of(groups, step) for step in range(stretch.begin, stretch.end))
    steps = stretch.steps(2 * timed_steps + 1, config.adam_every)
    batches = stretch_batches(stream, config, stage, len(steps), processes)
    whole = list(whole_steps(model, groups, batches, steps[:timed_steps + 1], processes))
    parts = list(sectioned_steps(model, groups, batches, steps[timed_steps + 1:], processes))
    batches.close()
    kinds = {kind: statistics.median(t["step"] for which, t in whole if which == kind) for kind, _ in whole}
    seconds, sections = averaged(whole, counts)["step"], averaged(parts, counts)

    # The work of the same rows.
    batches = stretch_batches(stream, config, stage, timed_steps, processes)
    keys = [visited_keys(config, batch.starts, windows_at(steps[1], config)) for batch in batches]
    keys, = summed([statistics.mean(keys)], processes)
    tokens = value_at(config.tokens_per_step, stage)
    rows, at_once, _ = step_sizes(config, stage, processes.world, device)
    shares = {kind: [g for g in groups.values() if g.is_due(next(s for s in steps if kind_of(groups, s) == kind))]
              for kind in counts}
    length = stretch.end - stretch.begin

    def mean(of) -> float:
        return sum(counts[kind] * of(shares[kind]) for kind in counts) / length

    flops = {name: value / processes.world for name, value in model_flops(config, shapes, tokens, keys).items()}
    work = sum(flops.values()) * processes.world
    flops = {**{name: 0.0 for name in SECTIONS}, **flops, "optimizer": mean(lambda due: update_flops(due, config))}
    bytes_moved = {**step_bytes(config, shapes, dtype, tokens // processes.world, rows // at_once),
                   "optimizer": mean(update_bytes),
                   "communication": (1 - 1 / processes.world) * mean(
                       lambda due: sum(g.gradients.nbytes + g.weights.nbytes for g in due))}
    predicted = predicted_memory(config, model.vocabulary, dtype, processes.world, device, (stage,))
    return {"stage": stretch.name, "steps": length, "tokens per step": tokens,
            "row": value_at(config.row_tokens, stage), "windows": windows_at(stretch.begin, config),
            "softmax scale": float(model.scale), "seconds": seconds, "with Adam": kinds.get("with Adam"),
            "without Adam": kinds.get("without"), "in sections": sections.pop("in sections"), "sections": sections,
            "tokens per second": tokens / seconds, "keys": keys, "model FLOP": work,
            "share of peak": work / seconds / processes.world / rates["peak"] if rates["peak"] else None,
            "share of matmul": work / seconds / processes.world / rates["matmul"],
            "FLOP": flops, "bytes": bytes_moved, "peak bytes": peak_memory(device) * MIB,
            "predicted bytes": sum(predicted.values()), "stage seconds": length * seconds}


def measure(config: Config, options: Options, processes: Processes, say=print) -> dict:
    """Every figure, as `--json` writes it. Raises Refusal."""
    check_processes(config, processes.world)
    dtype = compute_dtype(config, processes.device)
    float8 = float8_head(config, dtype, processes.device)
    with tempfile.TemporaryDirectory() as folder:
        stream, rows = open_rows(config, folder)
        shapes = model_shapes(config, stream.vocabulary, dtype)
        memory = predicted_memory(config, stream.vocabulary, dtype, processes.world, processes.device)
        say(f"{rows}; {processes.world} process(es) on {device_name(processes.device)}, {str(dtype)[6:]}"
            + ", head in float8" * float8)
        say(memory_lines(memory, config, shapes, dtype, processes.device))
        if processes.device.type == "cpu" and processes.world * sum(memory.values()) > (free := free_memory()):
            raise Refusal(f"this machine has {free / 2**30:.1f} GiB of memory free, fewer than these steps take; "
                          "--memory-only true predicts without running, --preset tiny is small")
        before = peak_memory(processes.device) * MIB
        matmul, copy = machine_rates(dtype, processes)
        rates = {"matmul": matmul, "copy": copy, "peak": peak_rate(processes.device, dtype)}
        model = GPT(config, stream.vocabulary, dtype).to(processes.device)
        model.float8 = float8
        groups = optimizer_groups(model, config, dtype, processes)
        compile_seconds = None
        if can_compile(config, processes, dtype, types.SimpleNamespace(line=say)):
            model.compile_parts()
            for group in groups.values():
                group.compile_update()
            alone = Processes(0, 1, processes.device)
            compile_seconds = warm_up(
                model, groups, processes,
                lambda step: next(prefetched(step_batches(stream, config, processes, step), processes)),
                lambda step: validate(model, stream, 1, step, alone))
        measured = [measure_stretch(stretch, model, groups, stream, options.timed_steps, processes, shapes, dtype,
                                    rates) for stretch in stretches(config)]
        torch.compiler.set_stance("default")
    return {"rows": rows, "device": device_name(processes.device), "processes": processes.world,
            "dtype": str(dtype)[6:], "rates": rates, "compile seconds": compile_seconds, "memory": memory,
            "bytes before the model": before, "on a CPU": processes.device.type == "cpu", "stages": measured,
            "run seconds": sum(stage["stage seconds"] for stage in measured),
            "timed steps": options.timed_steps, "config": vars(config)}


# Printed.


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else (
        f"{torch.get_num_threads()} CPU thread(s)" if device.type == "cpu" else "a GPU")


def memory_lines(parts: dict[str, int], config: Config, shapes: Shapes, dtype: torch.dtype,
                 device: torch.device) -> str:
    text = (f"predicted peak memory of a process in training {sum(parts.values()) / MIB:,.1f} MiB: "
            + ", ".join(f"{name} {size / MIB:,.1f}" for name, size in parts.items() if size))
    if device.type == "cuda":
        still = sum(parts[name] for name in ("weights", "gradients", "optimizer", "tables"))
        text += (f"\nin validation about {(still + validation_memory(config, shapes, dtype, device)) / MIB:,.1f} MiB; "
                 "both are computed from shapes and have not been compared with a GPU")
        flop, share, peak = run_flops(config, shapes), 0.4, PEAK_FLOPS["H100"]
        text += (f"\nthe whole run: {tokens_until(config.steps, config):,} tokens, {flop:.3g} FLOP of the model, so "
                 f"{flop / (share * peak) / 3600:,.2f} GPU-hours of H100s at {100 * share:.0f} % of their "
                 f"{peak / 1e12:.0f} TFLOP/s: computed, not run")
    return text


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    return "unknown" if value is None else f"{value:,.{digits}f}{unit}"


def aligned(rows: list[list[str]]) -> str:
    """Columns as wide as they must be, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) if i else cell.ljust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
                     for row in rows)


def roofline(figures: dict) -> str:
    """Each section of each stage: its work, and the least time that it takes at the measured rates of this machine."""
    rows = [["roofline, one process", "ms", "GFLOP", "MB", "FLOP/byte", "bound by", "least ms", "reached"]]
    rates = figures["rates"]
    for stage in figures["stages"]:
        for name in SECTIONS:
            flop, size, seconds = (stage[key].get(name, 0) for key in ("FLOP", "bytes", "sections"))
            limits = {"arithmetic": flop / rates["matmul"], "memory": size / rates["copy"]}
            bound = max(limits, key=limits.get)
            if name in ("data", "communication"):  # neither is bound by the device's memory
                bound, limits = "-", {"-": 0}
            least = limits[bound]
            rows.append([f"stage {stage['stage']}, {name}", number(1000 * seconds, 2), number(flop / 1e9, 3),
                         number(size / 1e6, 2), number(flop / size if size else 0.0), bound,
                         number(1000 * least, 2) if least else "-",
                         number(100 * least / seconds, 1, " %") if least and seconds else "-"])
    return aligned(rows)


def table(figures: dict) -> str:
    """A column for each stage and one for the run; what has no sum stays empty there."""
    stages = figures["stages"]

    def line(name: str, each, run: str = "") -> list[str]:
        return [name, *map(each, stages), run]

    def ms(value: float | None) -> str:
        return "-" if value is None else number(1000 * value, 2)

    steps = sum(stage["steps"] for stage in stages)
    tokens = sum(stage["steps"] * stage["tokens per step"] for stage in stages)
    work, run = sum(stage["steps"] * stage["model FLOP"] for stage in stages), figures["run seconds"]
    rate, world = figures["rates"], figures["processes"]
    return aligned([
        line("stage", lambda s: s["stage"], "run"),
        line("steps", lambda s: f"{s['steps']:,}", f"{steps:,}"),
        line("tokens/step", lambda s: f"{s['tokens per step']:,}", f"{tokens / steps:,.0f}"),
        line("tokens/row", lambda s: f"{s['row']:,}"),
        line("windows, long/short", lambda s: "/".join(map(str, s["windows"]))),
        line("softmax scale", lambda s: f"{s['softmax scale']:.4f}"),
        line("ms/step", lambda s: ms(s["seconds"]), ms(run / steps)),
        line("  with Adam", lambda s: ms(s["with Adam"])),
        line("  without", lambda s: ms(s["without Adam"])),
        line("ms/step in sections", lambda s: ms(s["in sections"])),
        *(line(f"  {name}", lambda s, name=name: ms(s["sections"].get(name, 0))) for name in (*SECTIONS, "rest")),
        line("tokens/s", lambda s: f"{s['tokens per second']:,.0f}", f"{tokens / run:,.0f}"),
        line("keys/query", lambda s: number(keys_per_query(s, figures["config"]))),
        line("MFU of peak", lambda s: number(s["share of peak"] and 100 * s["share of peak"], 1, " %"),
             number(100 * work / run / world / rate["peak"] if rate["peak"] else None, 1, " %")),
        line("MFU of matmul rate", lambda s: number(100 * s["share of matmul"], 1, " %"),
             number(100 * work / run / world / rate["matmul"], 1, " %")),
        line("peak MiB", lambda s: number(s["peak bytes"] / MIB, 0),
             number(max(s["peak bytes"] for s in stages) / MIB, 0)),
        line("  predicted", lambda s: number(s["predicted bytes"] / MIB, 0),
             number(sum(figures["memory"].values()) / MIB, 0)),
        line("predicted run, s", lambda s: number(s["stage seconds"], 2), number(run, 2)),
    ])


def keys_per_query(stage: dict, config: dict) -> float:
    """Keys that a token's head sees, mean over the attending layers; in paired ones it sees those of two heads."""
    attending = config["layers"] - len(config["attention_free"])
    return stage["keys"] / max(1, stage["tokens per step"] * attending * config["heads"])


def report(figures: dict) -> str:
    rates, on_gpu = figures["rates"], figures["compile seconds"] is not None
    lines = ["", roofline(figures), "",
             f"measured: products {number(rates['matmul'] / 1e9, 1, ' GFLOP/s')}, copies "
             f"{number(rates['copy'] / 1e9, 1, ' GB/s')}; peak "
             f"{number(rates['peak'] and rates['peak'] / 1e12, 0, ' TFLOP/s')}",
             f"compiled in {figures['compile seconds']:.1f} s, untimed" if on_gpu else "nothing is compiled",
             "sections wait for the device, whole steps do not; medians, weighted by the steps with Adam and without"]
    if figures["bytes before the model"]:
        lines.append("peak MiB is what the process holds at most, with the "
                     f"{figures['bytes before the model'] / MIB:,.0f} MiB from before the model was made"
                     + ", libraries loaded later and scraps of freed memory" * figures["on a CPU"])
    lines.append("the predicted run is steps x ms of each stage; validation and compilation are outside the clock")
    return "\n".join([*lines, "", table(figures)])


def main(arguments: list[str] | None = None) -> dict | None:
    """The command line. Returns the figures."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    options, config = read_options(sys.argv[1:] if arguments is None else arguments)
    if options.memory_only:
        device = torch.device("cpu" if config.device == "cpu" else "cuda")
        dtype = getattr(torch, config.dtype) if config.dtype != "auto" else (
            torch.bfloat16 if device.type == "cuda" else compute_dtype(config, device))
        world = int(os.environ.get("WORLD_SIZE", "1"))
        check_processes(config, world)
        vocabulary = vocabulary_of(config)[0]
        case, changes = (vocabulary, dtype, world, device), None
        print(f"{config.preset} with {vocabulary:,} different tokens, {world} process(es)")
        if options.gpu_memory:
            capacity = round(options.gpu_memory * 2**30)
            changes = settings_that_fit(config, *case, capacity)
            print(fit_line(config, *case, capacity, changes))
        config = replace(config, **changes or {})
        print(memory_lines(predicted_memory(config, *case), config, model_shapes(config, vocabulary, dtype), dtype,
                           device))
        return None
    processes = start_processes(config)
    silent = processes.rank > 0
    try:
        figures = measure(config, options, processes, (lambda line: None) if silent else print)
    except torch.OutOfMemoryError:
        raise Refusal("the GPU has too little memory; it needs less of it with --recompute true --loss-chunk 2048"
                      ) from None
    if not silent:
        if options.json:
            Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(report(figures))
    if dist.is_initialized():
        dist.destroy_process_group()
    return figures


if __name__ == "__main__":
    main()
