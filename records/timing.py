"""Step times and memory of a configuration on this machine, and how long its whole run would take.

    python records/timing.py --preset tiny                            # on a CPU
    torchrun --standalone --nproc_per_node=8 records/timing.py        # gpt2 on 8 GPUs
    python records/timing.py --memory-only true --recompute true      # a GPU's memory; it need not be there
    python records/timing.py --gpu-memory 24                          # and what makes it fit into 24 GiB

Options are those of train_gpt2.py, and those below. WORLD_SIZE=8 before a prediction means eight GPUs. Rows
come from --train-files where these exist, else they are made up. In the middle of each stage, after steps
that compile, N steps run as in training, and N more that wait for the device between their sections.

FLOP are the model's: 6 per token and weight of matrices and head, 12 per key that a query sees and channel of
its head, in documents of typical length, 18 per channel of a layer that leaves out its own value. Recomputation
counts nothing. Memory is in GiB of 2^30 bytes.
"""

import argparse
import glob
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "data")]
from text import BYTES, Encoding, write_shard

import train_gpt2
from train_gpt2 import GPT, Adam, Config, Group, Processes, TokenStream, UserError, value_at

GIB = 2**30
TYPICAL_DOCUMENT = 765  # tokens, the median of web text
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
              "RTX 4090": 165e12}  # dense bfloat16; the first name found in the GPU's own counts

# --------------------------------------------------------------------------------------------------
# Rows and stages.


def made_up_tokens(count: int, separator: int = train_gpt2.GPT2_SEPARATOR, longest: int = 2**40) -> np.ndarray:
    """(count,) uint16, uniform below the separator, in documents of a typical length, none above the longest."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, separator, count, dtype=np.uint16)
    lengths = draw.geometric(1 / TYPICAL_DOCUMENT, 8 + 2 * count // min(TYPICAL_DOCUMENT, longest))
    begins = np.cumsum(np.minimum(lengths, longest))
    tokens[begins[begins < count]] = separator
    return tokens


def vocabulary_of(config: Config) -> tuple[int, int]:
    """(vocabulary, separator) of the training shards; without any, what they will have."""
    if paths := sorted(glob.glob(config.train_files)):
        return train_gpt2.open_shard(paths[0])[2:]
    if config.train_files == train_gpt2.preset_values("tiny")["train_files"]:
        return BYTES.vocabulary, BYTES.separator
    return train_gpt2.GPT2_VOCABULARY, train_gpt2.GPT2_SEPARATOR


def open_rows(config: Config, folder: str) -> tuple[TokenStream, np.ndarray | None, str]:
    """The training shards, else a made-up one in `folder`; prefixes, if the recipe has them; and which of the two."""
    rows = f"rows of {config.train_files}"
    if glob.glob(config.train_files):
        stream = TokenStream(config.train_files)
    else:
        shard, (vocabulary, separator) = Path(folder) / "shard.bin", vocabulary_of(config)
        tokens = made_up_tokens(4 * max(config.tokens_per_step) + 1, separator)
        write_shard(shard, iter([tokens]), Encoding(vocabulary, separator, None))
        np.arange(-1, vocabulary - 1, dtype="<i4").tofile(shard.with_name(train_gpt2.PREFIXES))
        stream, rows = TokenStream(glob.escape(str(shard))), f"made-up rows, as no file matches {config.train_files}"
    return stream, train_gpt2.read_prefixes(stream) if config.prefix_weight else None, rows


class Stretch(NamedTuple):
    """Steps [begin, end) that cost the same: a stage, or several that take the same time."""

    stages: tuple[int, ...]
    begin: int
    end: int

    @property
    def name(self) -> str:
        return "-".join(str(stage) for stage in sorted({self.stages[0], self.stages[-1]}))

    def steps(self, count: int, period: int) -> list[int]:
        """So many from the middle on. A shorter stretch starts over, after whole periods of Adam."""
        middle, length = (self.end - self.begin) // 2, self.end - self.begin
        if middle + count > length:
            length = length // period * period or length
        return [self.begin + (middle + i) % length for i in range(count)]


def stretches(config: Config) -> list[Stretch]:
    """The run in order. Stages without a step are left out."""
    found, last, borders = [], None, train_gpt2.stage_borders(config)
    for stage, (begin, end) in enumerate(itertools.pairwise(borders)):
        windows = train_gpt2.windows_at(begin, config)[:2 if config.short_layers else 1]
        kind = (value_at(config.tokens_per_step, stage), train_gpt2.row_lengths(stage, config), windows,
                len(train_gpt2.token_weights(begin, config)), train_gpt2.prefix_weight(begin, config) > 0)
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
    sizes = {name: (value_at(getattr(config, name), stage),)
             for name in ("tokens_per_step", "row_tokens", "document_tokens")}
    batches = train_gpt2.step_batches(stream, replace(config, steps=count, repeat=True, **sizes), processes)
    return train_gpt2.prefetched(batches, processes.device)


# --------------------------------------------------------------------------------------------------
# FLOP and memory, from shapes alone.


class Sizes(NamedTuple):
    """A model that has shapes but no numbers, made by the trainer's own code."""

    parameters: dict[str, Tensor]
    groups: list[Group]  # of one process
    tables: int  # bytes of buffers
    injected: int  # layers that take up the embedding or bigrams once more


def model_sizes(config: Config, vocabulary: int) -> Sizes:
    """Nothing is allocated. The config's dtype is resolved."""
    with torch.device("meta"):
        model = GPT(config, vocabulary, [0] * vocabulary if config.prefix_weight else None)
        groups = train_gpt2.optimizer_groups(model, Processes(0, 1, torch.device("meta")))
    tables = sum(buffer.nbytes for buffer in model.buffers())
    injected = {*model.entrance.x0_layers, *model.entrance.bigram_layers}
    return Sizes(dict(model.named_parameters()), list(groups.values()), tables, len(injected))


def documents(starts: Tensor, paired: bool) -> Tensor:
    """Where the document of each position starts, of rows (R, T), in paired layers of 2 T positions."""
    document = train_gpt2.document_starts(starts)
    return document.repeat_interleave(2, dim=1) * 2 if paired else document


def attending(config: Config) -> Counter:
    """How many layers that attend are (short, paired)."""
    return Counter((i in config.short_layers, i in config.paired_layers)
                   for i in range(config.layers) if i not in config.attention_free)


def visited_keys(config: Config, starts: Tensor, windows: tuple[int, int]) -> int:
    """Keys that the queries of (R, T) rows see, summed over layers and heads, from the masks
    themselves. Paired layers have 2 T positions and half the heads."""
    total = 0
    for (short, paired), count in attending(config).items():
        first_key = train_gpt2.first_visible_key(documents(starts, paired), windows[short])
        keys = int((torch.arange(first_key.shape[1]) - first_key + 1).sum())
        total += count * keys * (config.heads // 2 if paired else config.heads)
    return total


def step_flops(config: Config, sizes: Sizes, stretch: Stretch) -> float:
    """FLOP of the model in a step of all processes."""
    stage, windows = stretch.stages[0], train_gpt2.windows_at(stretch.begin, config)
    row, longest = train_gpt2.row_lengths(stage, config)
    starts = made_up_tokens(max(1, 2**18 // row) * row, longest=longest) == train_gpt2.GPT2_SEPARATOR
    keys = visited_keys(config, torch.from_numpy(starts).view(-1, row), windows) / len(starts)
    weights = sum(p.numel() for name, p in sizes.parameters.items()
                  if name == "head" or p.dim() == 3 or name.endswith(("mudd_in", "mudd_out")))
    left_out = 18 * config.width * len(config.xsa_layers)
    attended = 12 * config.width // config.heads * keys
    return value_at(config.tokens_per_step, stage) * (6 * weights + attended + left_out)


def block_units(layer: int, config: Config) -> float:
    """What a compiled layer keeps for backward, in hidden states: numbers per token / width.

    Always: the stream it receives, unless that is the embedding; the MLP's normed input; its hidden channels before
    and, unless computed again, after the square. With attention: its normed input; query, key and value; query and
    key turned; what attention gives, also gated, also without its part along the value; the stream after it. A
    value of its own where something is added to it or heads are paired, and that something where it is weighed. The
    mixture where it is made once; where weights come from MUDD, both outputs, and its hidden channels.
    """
    dynamic, valued = config.mudd and layer == config.layers - 1, layer in config.value_layers
    hidden = train_gpt2.MLP_RATIO * (2 - (config.mlp_kernel == "quack"))
    units = 2 - (layer == 0) + hidden + (config.mixing == "blocks" or dynamic)
    if layer not in config.attention_free:
        units += 8 + config.attention_gates + (layer in config.xsa_layers) + dynamic
        units += valued or dynamic or layer in config.paired_layers or config.value_residual
        units += valued and (config.value_gates or dynamic)
    return units + dynamic * (2 * train_gpt2.MUDD_WIDTH + 14) / config.width


def kept_units(config: Config, sizes: Sizes) -> float:
    """What a forward pass keeps for backward, in hidden states: the embedding, its norm, bigrams and their signs,
    smear's embedding, the layers (of recomputed ones what they receive), the last norm's input, the
    gradient of its output."""
    bigrams = (config.bigram > 0) * min(config.bigram_width, config.width) / config.width
    units = 4 + (1 + (config.bigram_signs > 0)) * bigrams
    if config.recompute:
        received = config.layers - 1 + sizes.injected + len({*config.value_layers})
        return units + received + bigrams + 3 * config.value_residual
    exit_units = config.mudd * (2 * train_gpt2.MUDD_WIDTH + 5) / config.width
    return units + config.smear + exit_units + sum(block_units(i, config) for i in range(config.layers))


def mask_bytes(config: Config, rows: int, row_tokens: int, block: int) -> int:
    """First keys, and four lists of blocks, of each kind of layer."""
    lengths = [row_tokens * (1 + paired) for _, paired in attending(config)]
    return rows * sum(4 * tokens + 4 * 4 * (tokens // block) ** 2 for tokens in lengths)


GPU = torch.device("cuda")  # whose memory is predicted; it need not be there


def stage_memory(config: Config, sizes: Sizes, world: int, stage: int) -> dict[str, int]:
    """Bytes that a step of one stage needs beside weights, gradients and state: see predicted_memory."""
    dtype, matrix = getattr(torch, config.dtype), sizes.parameters["blocks.0.mlp"].dtype
    size = value_at(config.row_tokens, stage)
    rows = value_at(config.tokens_per_step, stage) // size // world
    most = train_gpt2.rows_at_once(config, size, GPU)
    at_once = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= most)
    narrow, broad, head = dtype.itemsize, train_gpt2.wide(dtype).itemsize, sizes.parameters["head"]
    unit = at_once * size * config.width * narrow
    masks = mask_bytes(config, at_once, size, train_gpt2.block_size(config))
    # Copies of weights that a pass keeps, in D x D of a layer: query, key and value in one, cast, or multiplied by
    # learned scalars. By block, the numbers.
    cast = matrix != dtype
    copies = narrow * config.width**2 * (cast * 2 * train_gpt2.MLP_RATIO * config.layers + attending(
        config).total() * (3 + cast + 4 * config.attention_mix))
    blocks = Counter()
    for name, p in sizes.parameters.items():
        if name.startswith("blocks."):
            blocks[name.split(".")[1]] += p.numel()
    # Logits of a chunk and their gradient; the head's gradient, whole and of a chunk, and its copies.
    loss = 2 * narrow * min(config.loss_chunk, at_once * size) * head.shape[0] + unit
    loss += head.numel() * (broad + narrow + narrow * (head.dtype != dtype))
    # Backward of a layer while all is still kept: gradients of the stream, of the MLP's hidden
    # channels, of query, key and value, and of its weights; and what is recomputed.
    backward = unit * (2 + 2 * train_gpt2.MLP_RATIO) + max(blocks.values()) * (narrow + broad) + head.nbytes
    if config.recompute:
        backward += round(unit * max(block_units(i, config) for i in range(config.layers)))
    return {"rows and masks": 2 * rows * size * (4 + 8 + 1) + masks,
            "activations": round(unit * kept_units(config, sizes)) + copies * (not config.recompute),
            "loss chunk": loss, "backward": max(0, backward - loss)}


def predicted_memory(config: Config, sizes: Sizes, world: int, stages: tuple = ()) -> dict[str, int]:
    """The most bytes of a process in compiled training on a GPU, by parts that add up to it.

    weights, gradients, optimizer, tables    exact
    rows and masks    two batches (one is prefetched) and the masks of a pass
    activations       what a forward pass keeps for backward
    loss chunk        logits of a chunk and the head's gradient, while all activations are kept
    backward          what a layer's backward needs beyond the room of the loss chunk
    update            what the largest update needs beyond the room of the three above

    Of the `stages` (none: all), the one that needs most.
    """
    parts, update = {"weights": 0, "gradients": 0, "optimizer": 0, "tables": sizes.tables}, 0
    for group in sizes.groups:
        share, item, is_adam = -(-group.length // world), group.weights[0], isinstance(group, Adam)
        state = [*group.state, group.settings if is_adam else group.scale]
        parts["weights"] += share * world * item.nbytes
        parts["gradients"] += share * item.nbytes * (world + (world > 1))
        parts["optimizer"] += share * sum(tensor.nbytes // len(tensor) for tensor in state)
        if not is_adam:  # what products need; Adam's numbers are never in memory
            update = max(update, 3 * share * item.numel() * group.state_dtype.itemsize)
    stages = stages or [stage for stretch in stretches(config) for stage in stretch.stages]
    worst = max((stage_memory(config, sizes, world, stage) for stage in stages),
                key=lambda needs: sum(needs.values()))
    room = sum(worst[name] for name in ("activations", "loss chunk", "backward"))
    return parts | worst | {"update": max(0, update - room)}


def validation_memory(config: Config, sizes: Sizes, world: int) -> int:
    """Bytes of a process in validation, about: what stays, six hidden states and those that wait for later layers,
    bigrams and values, the MLP's hidden channels, masks, a chunk of logits."""
    training, head = predicted_memory(config, sizes, world), sizes.parameters["head"]
    stays = sum(training[name] for name in ("weights", "gradients", "optimizer", "tables"))
    rows = train_gpt2.rows_at_once(config, config.val_row_tokens, GPU)
    tokens = rows * config.val_row_tokens
    units = 6 + bool(config.bigram) + 2 * bool(config.value_layers) + 2 * train_gpt2.MLP_RATIO
    units += sizes.injected + len(config.attention_source) + len(train_gpt2.skip_sources(config))
    numbers = tokens * (config.width * units + 4 + 8 + 1) + 2 * min(config.loss_chunk, tokens) * head.shape[0]
    masks = mask_bytes(config, rows, config.val_row_tokens, train_gpt2.MASK_BLOCK)
    return stays + masks + numbers * getattr(torch, config.dtype).itemsize


# On an H100 the peaks of five-minute, record 62 and today's gpt2 were within 7 % of the predictions, the last one's
# above them, as its loss still held two chunks of logits then; steps reached 37 to 40 % of the card's FLOP/s.
ACCURACY, SHARE = 0.07, 0.38
ELSEWHERE = 3 * GIB // 2  # CUDA context, libraries, waste of the allocator


def needed_memory(config: Config, sizes: Sizes, world: int) -> int:
    """Bytes that a GPU should have, in training and in validation, with a margin."""
    most = max(sum(predicted_memory(config, sizes, world).values()), validation_memory(config, sizes, world))
    return round(most * (1 + ACCURACY)) + ELSEWHERE


def settings_that_fit(config: Config, sizes: Sizes, world: int, capacity: int) -> dict | None:
    """Settings to change so that a GPU of `capacity` bytes holds the same training: none if it does;
    else fewer tokens of a pass, if that does not help shorter chunks of the loss too, if that does not
    help recomputation, then with shorter chunks. None if nothing does. A pass holds at least one row."""
    most, least = config.micro_tokens or 65_536, min(config.row_tokens)
    tokens = [config.micro_tokens] + [most >> i for i in range(1, 40) if most >> (i - 1) > least]
    for recompute, chunk in ((config.recompute, 2**30), (config.recompute, 8192), (True, 2**30), (True, 8192),
                             (True, 2048)):
        chunk = min(chunk, config.loss_chunk)
        for micro_tokens in tokens:
            wanted = {"micro_tokens": micro_tokens, "recompute": recompute, "loss_chunk": chunk}
            changed = {name: value for name, value in wanted.items() if value != getattr(config, name)}
            if needed_memory(replace(config, **changed), sizes, world) <= capacity:
                return changed
    return None


def exchanged(sizes: Sizes, world: int) -> dict[str, float]:
    """Bytes that a process sends in an average step, by group: its gradients to be reduced, its slice to all."""
    every = {group.name: group.config.adam_every if isinstance(group, Adam) else 1 for group in sizes.groups}
    return {g.name: 2 * g.weights.nbytes * (world - 1) / world / every[g.name] for g in sizes.groups}


def typed_out(changes: dict) -> str:
    return " ".join(f"{train_gpt2.flag(name)} {train_gpt2.spelled(value)}" for name, value in changes.items())


def fit_line(config: Config, sizes: Sizes, world: int, capacity: int, changes: dict | None) -> str:
    """What settings_that_fit has found, in words."""
    needs = [f"{needed_memory(replace(config, **some), sizes, world) / GIB:.1f} GiB"
             for some in ({}, changes or {})]
    line = f"a GPU needs {needs[0]}, margin included, and has {capacity / GIB:.1f} GiB"
    if changes is None:
        return f"{line}: no setting makes it fit; take more GPUs or a smaller model"
    return line + f": chosen for you: {typed_out(changes)}, which needs {needs[1]}" * bool(changes)


def memory_lines(config: Config, sizes: Sizes, world: int) -> str:
    parts = predicted_memory(config, sizes, world)
    flop = sum((s.end - s.begin) * step_flops(config, sizes, s) for s in stretches(config))
    named = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size > GIB / 20)
    return (f"predicted memory of a GPU in training {sum(parts.values()) / GIB:.1f} GiB ({named}), in "
            f"validation {validation_memory(config, sizes, world) / GIB:.1f} GiB; on an H100 such predictions "
            f"were right within {100 * ACCURACY:.0f} %\nthe whole run: "
            f"{sum(p.numel() for p in sizes.parameters.values()):,} parameters, "
            f"{train_gpt2.tokens_until(config.steps, config):,} tokens, {flop:.3g} FLOP: "
            f"{flop / (SHARE * PEAK_FLOPS['H100']) / 3600:,.2f} hours of one H100 at {100 * SHARE:.0f} % of its peak, "
            "as measured")


# --------------------------------------------------------------------------------------------------
# Measured: a step as it is, a step in sections.

SECTIONS = ("data", "forward", "loss", "backward", "optimizer", "communication", "rest")
PLACES = ((GPT, "forward", "forward"), (GPT, "loss", "loss"), (Tensor, "backward", "backward"),
          (train_gpt2, "apply_updates", "optimizer"), (Group, "reduce", "communication"),
          (Group, "wait", "communication"), (train_gpt2, "all_gather", "communication"))


class Sections:
    """Seconds by section. One that begins inside another pauses it: every moment counts once."""

    def __init__(self, device: torch.device):
        self.device, self.names, self.seconds, self.since = device, [], Counter(), 0.0

    def charge(self) -> None:
        """The time since the last call goes to the innermost section. Only the stream of the
        arithmetic is waited for: a reduction beside it shows when somebody waits for it."""
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
def watched(section, places: tuple):
    """Functions of the trainer run inside section(name) meanwhile; it needs no code for that."""
    def inside(function, name: str):
        def run(*arguments, **named):
            with section(name):
                return function(*arguments, **named)
        return run

    with ExitStack() as stack:
        for owner, function, name in places:
            stack.enter_context(mock.patch.object(owner, function, inside(getattr(owner, function), name)))
        yield


def kind_of(groups: dict[str, Group], step: int) -> str:
    """Steps of one kind cost the same: those in which Adam updates, and the others."""
    return "with Adam" if any(isinstance(g, Adam) and g.is_due(step) for g in groups.values()) else "without"


def whole_steps(model: GPT, groups: dict[str, Group], batches, steps: list[int], processes: Processes):
    """Yield (kind, {"step": seconds}) as in training, where the device is one step behind at most. The
    first step is not timed."""
    on_gpu, marks = processes.device.type == "cuda", []
    for number, step in enumerate(steps):
        train_gpt2.train_step(model, groups, next(batches), step)
        marks.append(torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter())
        if on_gpu:
            marks[-1].record()
            marks[max(0, number - 1)].synchronize()
    processes.synchronize()
    for step, (before, after) in zip(steps[1:], itertools.pairwise(marks), strict=True):
        yield kind_of(groups, step), {"step": before.elapsed_time(after) / 1000 if on_gpu else after - before}


def sectioned_steps(model: GPT, groups: dict[str, Group], batches, steps: list[int], processes: Processes):
    """Yield (kind, seconds by section) of steps that wait between their sections."""
    for step in steps:
        sections = Sections(processes.device)
        with watched(sections.section, PLACES), sections.section("rest"):
            with sections.section("data"):
                batch = next(batches)
            train_gpt2.train_step(model, groups, batch, step)
        yield kind_of(groups, step), {name: sections.seconds[name] for name in SECTIONS}


def averaged(measured: list[tuple[str, dict]], counts: Counter) -> dict[str, float]:
    """Means over a stretch of `counts` steps of each kind, from medians within the kinds."""
    kinds = {kind for kind, _ in measured} & set(counts)
    total = sum(counts[kind] for kind in kinds)
    return {name: sum(counts[kind] * statistics.median(values[name] for of, values in measured if of == kind)
                      for kind in kinds) / total for name in measured[0][1]}


def compile_stretch(stretch: Stretch, model: GPT, groups: dict[str, Group], stream: TokenStream,
                    processes: Processes) -> float:
    """Run steps of both kinds, so that nothing is compiled in those that are timed. Seconds."""
    begin, config = time.perf_counter(), model.config
    torch.compiler.set_stance("default")
    for group in groups.values():
        group.communicates = False  # others may take minutes longer
    batches = stretch_batches(stream, config, stretch.stages[0], config.adam_every, processes)
    for step, batch in zip(stretch.steps(config.adam_every, config.adam_every), batches, strict=True):
        train_gpt2.train_step(model, groups, batch, step)
    processes.synchronize()
    processes.barrier()
    for group in groups.values():
        group.communicates = processes.world > 1
    return time.perf_counter() - begin


def measure_stretch(stretch: Stretch, model: GPT, groups: dict[str, Group], stream: TokenStream, timed: int,
                    processes: Processes, sizes: Sizes, peak: float | None) -> dict:
    """All figures of one stretch of the run; per step and over all processes if nothing else is said."""
    config, stage, world = model.config, stretch.stages[0], processes.world
    compiling = compile_stretch(stretch, model, groups, stream, processes)
    if processes.device.type == "cuda":
        torch.compiler.set_stance("fail_on_recompile")
        torch.cuda.reset_peak_memory_stats(processes.device)
    steps = stretch.steps(2 * timed + 1, config.adam_every)
    with closing(stretch_batches(stream, config, stage, len(steps), processes)) as batches:
        whole = list(whole_steps(model, groups, batches, steps[:timed + 1], processes))
        parts = list(sectioned_steps(model, groups, batches, steps[timed + 1:], processes))
    counts = Counter(kind_of(groups, step) for step in range(stretch.begin, stretch.end))
    kinds = {kind: 1000 * statistics.median(t["step"] for of, t in whole if of == kind) for kind, _ in whole}
    seconds, sections = averaged(whole, counts)["step"], averaged(parts, counts)
    tokens, length = value_at(config.tokens_per_step, stage), stretch.end - stretch.begin
    share = 100 * step_flops(config, sizes, stretch) / seconds / world / peak if peak else None
    predicted = sum(predicted_memory(config, sizes, world, stretch.stages).values())
    return {"stage": stretch.name, "steps": length, "tokens/step": tokens,
            "tokens/row": value_at(config.row_tokens, stage),
            "windows": "/".join(map(str, train_gpt2.windows_at(stretch.begin, config))),
            "ms/step": 1000 * seconds, "ms with Adam": kinds.get("with Adam"),
            "ms without Adam": kinds.get("without"), "ms in sections": 1000 * sum(sections.values()),
            **{f"ms in {name}": 1000 * part for name, part in sections.items()},
            "tokens/s": round(tokens / seconds), "% of peak FLOP/s": share,
            "peak GiB": train_gpt2.peak_memory(processes) / 1024,
            "GiB predicted": predicted / GIB if model.compiled else None,
            "s to compile": compiling if model.compiled else None, "s of all steps": length * seconds}


def measure(config: Config, options: argparse.Namespace, processes: Processes, say) -> dict:
    """Every figure, as --json writes it; none if nothing is timed. Raises UserError."""
    config, float8, compiled = train_gpt2.for_device(config, processes)
    config = train_gpt2.checked_kernels(config, processes, compiled, SimpleNamespace(line=say))
    device, name = processes.device, f"{torch.get_num_threads()} CPU thread(s)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    peak = next((rate for part, rate in PEAK_FLOPS.items() if part in name), None)
    with tempfile.TemporaryDirectory() as folder:
        stream, prefixes, rows = open_rows(config, folder)
        say(f"{rows}; {processes.world} process(es) on {name}, {config.dtype}" + ", head in float8" * float8)
        sizes = model_sizes(config, stream.vocabulary)
        if device.type == "cuda":
            say(memory_lines(config, sizes, processes.world))
        model = GPT(config, stream.vocabulary, prefixes, float8, compiled).to(device)
        groups = train_gpt2.optimizer_groups(model, processes)
        chosen = [s for s in stretches(config) if not options.stages or set(s.stages) & options.stages]
        torch._functorch.config.force_non_lazy_backward_lowering = options.backward_first
        if not options.timed_steps:
            seconds = sum(compile_stretch(stretch, model, groups, stream, processes) for stretch in chosen)
            if 0 in chosen[0].stages and not options.backward_first:  # its graphs are those of all stages
                train_gpt2.validate(model, stream, 1, 0, Processes(0, 1, device))
            say(f"compiled in {seconds:.1f} s")
            return {}
        stages = [measure_stretch(stretch, model, groups, stream, options.timed_steps, processes, sizes, peak)
                  for stretch in chosen]
        torch.compiler.set_stance("default")
    return {"rows": rows, "device": name, "processes": processes.world, "stages": stages,
            "run seconds": sum(stage["s of all steps"] for stage in stages), "config": asdict(config)}


def aligned(rows: list[list[str]]) -> str:
    """Columns as wide as they must be, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in
              enumerate(zip(row, widths, strict=True))] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


def table(figures: dict) -> str:
    """A column for each stage, a row for each figure that is known."""
    def text(value) -> str:
        return {int: "{:,}", float: "{:,.2f}", str: "{}"}.get(type(value), "-").format(value)

    rows = [[name, *(text(stage[name]) for stage in figures["stages"])] for name in figures["stages"][0]]
    return (f"{aligned([row for row in rows if set(row[1:]) != {'-'}])}\n"
            f"predicted run: {figures['run seconds']:,.1f} s, without validation and compilation\n"
            "sections wait for the device, whole steps do not; medians, weighted by the steps with and without Adam")


# --------------------------------------------------------------------------------------------------
# Command line.


def read_options(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """Own options, and the config that the others make. Raises UserError."""
    parser = train_gpt2.Parser(usage="python records/timing.py [OPTIONS] [OPTIONS of train_gpt2.py]",
                               description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                               allow_abbrev=False)
    add = parser.add_argument
    add("--timed-steps", type=int, default=5, metavar="N", help="steps of a stage (5); 0: only compile")
    add("--stages", type=lambda text: set(map(int, text.split(","))), default=set(), metavar="A,B",
        help="only these, from 0 on (all)")
    add("--backward-first", action="store_true", help="compile each backward graph right after its forward graph: "
        "beside a process that compiles the same stage without this, each finds half of the graphs on disk")
    add("--json", type=Path, metavar="FILE", help="write all figures there as well")
    add("--memory-only", choices=("true", "false"), default="false", help="predict memory, run nothing")
    add("--gpu-memory", type=float, default=0.0, metavar="GIB", help="the same, and what fits into so much")
    add("--fit", action="store_true", help="print only the settings to add for the GPUs of this machine")
    options, rest = parser.parse_known_args(arguments)
    config = train_gpt2.parse_command_line(rest)
    if not 0 <= options.gpu_memory <= 1e6:
        parser.error(f"--gpu-memory {options.gpu_memory} is not from 0 to 1e6 GiB")
    if options.timed_steps and options.timed_steps < config.adam_every:
        parser.error(f"--timed-steps {options.timed_steps} is fewer than --adam-every {config.adam_every}")
    stages = {stage for stretch in stretches(config) for stage in stretch.stages}
    if options.stages and not options.stages & stages:
        parser.error(f"--stages has none of {sorted(stages)}")
    return options, config


def predict(config: Config, options: argparse.Namespace) -> None:
    """Print what a GPU needs, which need not be there. Raises UserError."""
    gpus = torch.cuda.device_count() if options.fit and config.device != "cpu" else 0
    words = os.environ.get("WORLD_SIZE", "1")
    if not words.isdecimal() or words == "0":
        raise UserError(f"WORLD_SIZE is {words!r}, expected a number of GPUs")
    world = gpus or int(words)
    config = replace(config, dtype="bfloat16" if config.dtype == "auto" else config.dtype)
    train_gpt2.for_device(config, Processes(0, world, torch.device("cpu")))  # whether so many share a step
    vocabulary = vocabulary_of(config)[0]
    sizes, capacity, changes = model_sizes(config, vocabulary), round(options.gpu_memory * GIB), {}
    if gpus:
        capacity = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(gpus))
    if capacity and not (options.fit and config.micro_tokens):  # which is then the user's choice
        changes = settings_that_fit(config, sizes, world, capacity)
        line = fit_line(config, sizes, world, capacity, changes)
        print(line, file=sys.stderr if options.fit else sys.stdout)
    if options.fit:
        print(typed_out(changes or {}))
    else:
        print(f"{config.preset} with {vocabulary:,} different tokens on {world} GPU(s)")
        print(memory_lines(replace(config, **changes or {}), sizes, world))
        if world > 1:
            sent = exchanged(sizes, world)
            print(f"MB sent by a process in an average step: {sum(sent.values()) / 1e6:,.1f}: "
                  + ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in sent.items()))


def main(arguments: list[str] | None = None) -> dict | None:
    """The command line. Returns the figures."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    options, config = read_options(sys.argv[1:] if arguments is None else arguments)
    if options.fit or options.gpu_memory or options.memory_only == "true":
        return predict(config, options)
    processes = train_gpt2.start_processes(config)
    if processes.device.type == "cuda":
        train_gpt2.compile_cache(config)  # what is compiled here, a run finds
    else:
        ready, *_ = train_gpt2.for_device(config, processes)
        need = needed_memory(ready, model_sizes(ready, vocabulary_of(ready)[0]), processes.world)
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if need > has:
            raise UserError(f"--preset {config.preset} needs about {need / GIB:.0f} GiB, this machine has "
                            f"{has / GIB:.0f}; here --preset tiny, or a GPU (--memory-only true predicts it)")
    try:
        with open(options.json or os.devnull, "a", encoding="utf-8"):  # before anything is computed
            figures = measure(config, options, processes, (lambda _: None) if processes.rank else print)
        if figures and not processes.rank:
            print(table(figures), flush=True)  # first, as the file may fail
            if options.json:
                options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except (OSError, torch.OutOfMemoryError) as error:
        raise UserError(train_gpt2.one_line(error) or f"cannot write {options.json}: {error}") from None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return figures


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    if sys.stdout:  # None where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")
    main()
