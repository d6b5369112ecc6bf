"""The way from the `five-minute` recipe to `gpt2`, technique by technique, and `gpt2` with each technique left out.

    python records/ladder.py --train-files 'data/text/text_train_*.bin' --val-files 'data/text/text_val_*.bin' \\
        --steps 160 --seeds 3 --leave-one-out --jobs 2                  # small models, on a CPU with two cores
    python records/ladder.py --size 124M --steps 1600 --leave-one-out   # the recipes themselves, on a GPU

A rung sets a few fields of Config to what `gpt2` has and keeps those of the rungs before it; the first rung is
`five-minute`, the last is `gpt2`. Every run sees the same number of tokens, within 1 %: --steps is the length of
`gpt2`, rungs with another batch get as many steps as fit. Schedules are fractions of a run, so they stretch.
Differences are taken between runs of the same seed. Writes ladder.md, ladder.png and runs.jsonl, one line for each
finished run, to the folder --out: what is in there is not computed again, so an interrupted command goes on where it
stopped.
"""

import argparse
import dataclasses
import datetime
import glob
import hashlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train_gpt2  # noqa: E402
from train_gpt2 import (  # noqa: E402
    HAD_BY_12,
    TECHNIQUES,
    Config,
    Processes,
    UserError,
    check_config,
    for_device,
    open_data,
    preset_values,
    start_processes,
    tokens_until,
    train,
)

# ----------------------------------------------------------------------------------------------------------------------
# Rungs. In: the two presets, at a size. Out: the configurations between them.


class Rung(NamedTuple):
    """A technique: its name as an option takes it, what it is, the records that brought it, and the fields of Config
    that it moves from their `five-minute` to their `gpt2` value."""

    name: str
    what: str
    records: str
    fields: tuple[str, ...]


# In the order of history, as TECHNIQUES has them, without those of record 12 itself. Fields that make no sense alone
# move with their technique; some rungs are values only. Where several records tuned one field, its rung takes the last
# value at once.
MOVES_WITH = {"value-embeddings": ("value_residual",), "attention-free": ("layers",), "normuon": ("muon_lr", "down_scale"),
              "gated-skip": ("unet_skips", "residual_init"), "tied-head": ("adam_embedding", "adam_head"),
              "rate-levels": ("tokens_per_step", "row_tokens", "steps")}
VALUES = {  # by the technique that they come before
    "documents": [Rung("epsilons", "smaller ones in Adam and in the norms", "20 21 57", ("adam_epsilon", "rms_epsilon")),
                  Rung("validation-rows", "longer context in validation", "21 39", ("val_row_tokens", "val_every"))],
    "multi-token": [Rung("smooth-scalars", "Adam's settings for scalars", "52 57", ("adam_x0", "adam_scalars"))]}
START, RUNGS = Rung("five-minute", "record 12", "12", ()), []
for name, technique in TECHNIQUES.items():
    RUNGS += VALUES.get(name, [])
    if name not in HAD_BY_12 or name == "softcap":
        RUNGS.append(Rung(name, technique.reason, technique.records, (*technique.neutral, *MOVES_WITH.get(name, ()))))
NOTHING = Rung("nothing", "the full recipe", "", ())  # what is left out in the first line of that table

# The recipes made small: (five-minute, gpt2) where they differ, one value where they do not. Learning rates stay. Rows
# and batches keep the ratios 4 to 1, 2, 3, windows are an eighth. Six layers stand for eleven, {0,1} {2,3} {4,5} {6}
# {7,8,9} {10}, so that each role stays in its place: long windows in the second and the last, no attention in the
# fourth, which the skip enters and the backout follows. The softmax scale keeps its ratio to 1 / sqrt(head width).
# Rows come from all over the text, which may be one document and shorter than a run.
TINY = {
    "shuffle": True, "repeat": True, "long_documents": "continue", "document_tokens": (0, 256),
    "tokens_per_step": ((2048,), (512, 1024, 1536)), "row_tokens": ((512,), (128, 256, 384)),
    "val_tokens": 32_768, "val_row_tokens": (512, 2048), "layers": 6, "heads": 2, "width": 128,
    "window": ((127,), (48, 112, 176, 208)), "window_short": (16, 48, 80, 96), "window_final": (0, 320),
    "short_layers": ((), (0, 2, 4)), "paired_layers": ((), (0, 2, 4)), "attention_free": ((), (3,)),
    "attention_scale": (0.0, 0.1 * 2**0.5), "value_layers": ((), (0, 4, 5)),
    "gated_skip": ((), (1, 3)), "backout": ((), (4,)), "bigram": (0, 16),
}
SIZES = {"tiny": TINY, "124M": {}}


def both_ends(size: str = "124M", **common) -> tuple[Config, Config]:
    """The two recipes at a size, with `common` fields set in both."""
    moved = {field for rung in RUNGS for field in rung.fields}
    ends = []
    for end, preset in enumerate(("five-minute", "gpt2")):
        sizes = {name: value[end] if name in moved and isinstance(value, tuple) else value
                 for name, value in SIZES[size].items()}
        ends.append(Config(**preset_values(preset) | {"preset": "gpt2"} | sizes | common))
    return tuple(ends)


def climb(start: Config, end: Config) -> list[tuple[Rung, Config]]:
    """The configurations from one to the other. Rungs that change nothing at this size are left out."""
    path = [(START, start)]
    for rung in RUNGS:
        config = replace(path[-1][1], **{field: getattr(end, field) for field in rung.fields})
        if config != path[-1][1]:
            path.append((rung, config))
    assert path[-1][1] == end, "a field that differs between the presets belongs to no rung"
    return path


def without(rung: Rung, start: Config, end: Config) -> Config:
    """The last rung, with one technique as `five-minute` has it."""
    return replace(end, **{field: getattr(start, field) for field in rung.fields})


def with_budget(config: Config, tokens: int) -> Config:
    """As many steps as come nearest to these training tokens."""
    about = round(tokens * 1000 / tokens_until(1000, replace(config, steps=1000)))
    near = (replace(config, steps=steps) for steps in range(max(1, about - 3), about + 4))
    return min(near, key=lambda choice: abs(tokens_until(choice.steps, choice) - tokens))


def equal_budgets(configs: list[Config], end: Config, steps: int) -> list[Config]:
    """Every configuration with the tokens that `end` sees in `steps`. Raises UserError where steps are too coarse."""
    def fitted(steps: int) -> tuple[list[Config], float]:
        budget = tokens_until(steps, replace(end, steps=steps))
        found = [with_budget(config, budget) for config in configs]
        return found, max(abs(tokens_until(config.steps, config) / budget - 1) for config in found)

    found, off = fitted(steps)
    if off > 0.01:
        enough = next(more for more in range(steps + 1, 10**6) if fitted(more)[1] <= 0.01)
        raise UserError(f"--steps {steps} cannot give all rungs the same tokens within 1 %, the farthest is "
                      f"{100 * off:.1f} % off; the nearest is --steps {enough}")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Runs. In: configurations. Out: a line in runs.jsonl for each, as soon as it has ended.


class Run(NamedTuple):
    name: str
    config: Config  # with its seed

    def key(self, streams: tuple[int, int]) -> str:
        """What makes a stored result this run's: its configuration, the size of the data, and the script."""
        settings = {**dataclasses.asdict(self.config), "out": None, "streams": streams}
        script = Path(train_gpt2.__file__).read_bytes()
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + script).hexdigest()[:16]


def train_once(config: Config, threads: int, output: Path, channel) -> None:
    """One run, in a process of its own; what it prints goes to a file. Sends the last validation loss and the time."""
    with open(output, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    tqdm.set_lock(threading.RLock())  # its own would be one between processes, which Ctrl-C leaves behind
    if config.device == "cpu":
        torch.set_num_threads(threads)
    folder = train(config, start_processes(config))
    (folder / "model.pt").unlink()  # hundreds of runs, and only their losses are asked for
    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    channel.send({"loss": last["val_loss"], "seconds": last["train_time_s"], "tokens": last["tokens"]})


def finish_all(runs: list[Run], jobs: int, threads: int, folder: Path) -> Iterator[tuple[Run, dict | None, Path]]:
    """Yield each run, what it found (None: it failed) and the file with its output, in the order in which they end.
    Each has its own process: no memory, compiler state or number of threads is passed on."""
    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    if "forkserver" in ways:  # a process that has imported torch, once, and starts the others by forking
        context.set_forkserver_preload(["torch", "torch.nn.attention.flex_attention"])
    waiting, running = list(reversed(runs)), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop()
                receiver, channel = context.Pipe(duplex=False)
                output = folder / f"{run.name.replace(' ', '_')}_seed{run.config.seed}.txt"
                process = context.Process(target=train_once, args=(run.config, threads, output, channel))
                process.start()
                channel.close()
                running[process.sentinel] = process, run, receiver, output
            for sentinel in wait(running):
                process, run, receiver, output = running.pop(sentinel)
                process.join()
                yield run, receiver.recv() if process.exitcode == 0 else None, output
    finally:
        for process, *_ in running.values():
            process.terminate()
            process.join()


def stored_results(path: Path) -> dict[str, dict]:
    """The lines of runs.jsonl by their key; one that was cut off by a crash counts nothing."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            found[record["key"]] = record
        except (json.JSONDecodeError, KeyError):
            continue
    return found


def append(path: Path, record: dict) -> None:
    """One more line, also after one that was cut off."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"\n" * (file.read() != b"\n"))
        file.write(json.dumps(record).encode() + b"\n")


def collect(runs: list[Run], streams: tuple[int, int], jobs: int, threads: int, machine: str,
            folder: Path) -> dict[tuple[str, int], dict]:
    """The result of each run by (name, seed), stored or computed now. Raises UserError when runs keep failing."""
    path = folder / "runs.jsonl"
    stored, keys = stored_results(path), {run: run.key(streams) for run in runs}
    missing = {}  # by key: without the last rung is the rung before it
    for run in runs:
        if keys[run] not in stored:
            missing.setdefault(keys[run], run)
    unused = len(set(stored) - set(keys.values()))
    print(f"{len(set(keys.values()))} runs, {len(set(keys.values())) - len(missing)} of them in {path} already"
          + (f" ({unused} others there are of another script, configuration or data)" if unused else ""), flush=True)
    begin, failed = time.perf_counter(), 0
    for done, (run, result, output) in enumerate(finish_all(list(missing.values()), jobs, threads, folder), 1):
        left = (time.perf_counter() - begin) / done * (len(missing) - done)
        label = f"{done}/{len(missing)} {run.name}, seed {run.config.seed}"
        if result is None:
            lines = output.read_text(encoding="utf-8").splitlines() or ["it was killed"]
            failed += 1
            print(f"{label}: failed: {lines[-1]} (all of it in {output})", flush=True)
            if failed == 3:
                raise UserError("three runs have failed; those finished are kept; mend the cause, then give the same "
                              "command again")
            continue
        stored[keys[run]] = {"key": keys[run], "name": run.name, "seed": run.config.seed, "steps": run.config.steps,
                             **result, "machine": machine}
        append(path, stored[keys[run]])
        print(f"{label}: loss {result['loss']:.4f} in {result['seconds']:.1f} s of training; about "
              f"{datetime.timedelta(seconds=round(left))} left", flush=True)
    return {(run.name, run.config.seed): stored[keys[run]] for run in runs if keys[run] in stored}


# ----------------------------------------------------------------------------------------------------------------------
# Table and picture. In: results. Out: Markdown and a PNG.


class Effect(NamedTuple):
    """A mean over seeds of differences within a seed, and its standard error; NaN where seeds are too few."""

    mean: float
    error: float

    def verdict(self) -> str:
        if self.mean == self.error == 0:
            return "none here"
        if math.isnan(self.error):
            return ""
        return "within noise" if abs(self.mean) < 2 * self.error else "lower" if self.mean < 0 else "higher"

    def text(self, digits: int) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.{digits}f}"
        return f"{self.mean:+.{digits}f}{error}"


def effect(after: dict[int, float], before: dict[int, float]) -> Effect:
    """By seed: paired, so that what a seed does to both sides cancels."""
    differences = [after[seed] - before[seed] for seed in after if seed in before]
    if not differences:
        return Effect(math.nan, math.nan)
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.nan
    return Effect(statistics.fmean(differences), error)


def chance_beyond(errors: float, seeds: int) -> float:
    """How often a mean of so many differences lies this many of its standard errors from zero when nothing but noise is
    there: Student's t with seeds - 1 degrees of freedom, whose density in tan(angle) is a power of the cosine."""
    freedom = seeds - 1
    angle = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angle) ** (freedom - 1)
    return float(density[angle > math.atan(errors / freedom**0.5)].sum() / density.sum())


class Row(NamedTuple):
    """One line of a table: losses and seconds by seed, and their differences to another line (None: the first)."""

    rung: Rung
    steps: int
    losses: dict[int, float]
    seconds: dict[int, float]
    loss_effect: Effect | None
    time_effect: Effect | None


def rows_of(named: list[tuple[Rung, str]], results: dict, seeds: range, against: str | None = None) -> list[Row]:
    """(rung, name of its runs) in order -> rows, each compared with the one before, or all with the runs of a name."""
    rows, columns = [], ("loss", "seconds")
    for place, (rung, name) in enumerate(named):
        mine = [{seed: results[name, seed][column] for seed in seeds if (name, seed) in results} for column in columns]
        other = against or (named[place - 1][1] if place else None)
        effects = [None, None]
        if other not in (None, name):
            effects = [effect(own, {seed: results[other, seed][column] for seed in seeds if (other, seed) in results})
                       for own, column in zip(mine, columns, strict=True)]
        steps = next((results[name, seed]["steps"] for seed in seeds if (name, seed) in results), 0)
        rows.append(Row(rung, steps, *mine, *effects))
    return rows


def mean_and_spread(values: dict[int, float], digits: int) -> str:
    if not values:
        return "failed"
    spread = f" ± {statistics.stdev(values.values()):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values.values()):.{digits}f}{spread}"


def numbers(rung: Rung) -> str:
    return " ".join(f"#{record}" for record in rung.records.split())


def table(rows: list[Row], head: str, compared: str, explained: bool = True) -> str:
    """Markdown; explained: with a column that says what each technique is."""
    lines = [f"| {head} |{' what |' * explained} records | steps | loss ± spread | {compared} ± error | loss is "
             f"| seconds ± spread | {compared} ± error |", f"|---|{'---|' * explained}---|--:|--:|--:|---|--:|--:|"]
    for row in rows:
        known = row.loss_effect is not None and not math.isnan(row.loss_effect.mean)
        compare = (row.loss_effect.text(4), row.loss_effect.verdict()) if known else ("", "")
        times = row.time_effect.text(1) if known else ""
        what = f" {row.rung.what} |" * explained
        lines.append(f"| {row.rung.name} |{what} {numbers(row.rung)} | {row.steps} | "
                     f"{mean_and_spread(row.losses, 4)} | {compare[0]} | {compare[1]} | "
                     f"{mean_and_spread(row.seconds, 1)} | {times} |")
    return "\n".join(lines)


BETTER, WORSE, NOISE, INK = "#3a8f4d", "#c8553d", "#b4b4b4", "#222222"
COLOURS = {"lower": BETTER, "higher": WORSE}  # of a loss; all else is noise


def draw(path: Path, ladder: list[Row], left_out: list[Row], title: str) -> None:
    """Loss and time per rung beside each other, and in the same line what leaving that technique out does."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ladder = [row for row in ladder if row.losses]
    left_out = [row for row in left_out if row.loss_effect is not None and not math.isnan(row.loss_effect.mean)]
    rungs = [row.rung for row in ladder] or [row.rung for row in left_out]
    place = {rung.name: line for line, rung in enumerate(rungs)}
    left_out = [row for row in left_out if row.rung.name in place]
    panels = 2 * bool(ladder) + bool(left_out)
    figure, axes = plt.subplots(1, panels, figsize=(3.6 + 2.6 * panels, 2.2 + 0.29 * len(rungs)), sharey=True,
                                squeeze=False, facecolor="white", layout="constrained")
    axes = list(axes[0])

    def spread(values: dict[int, float]) -> float:
        return statistics.stdev(values.values()) if len(values) > 1 else 0.0

    def error(found: Effect) -> float:
        return 0.0 if math.isnan(found.error) else found.error

    if ladder:
        lines = range(len(ladder))
        losses, times = ([statistics.fmean(values.values()) for values in column]
                         for column in ([row.losses for row in ladder], [row.seconds for row in ladder]))
        colours = [INK if row.loss_effect is None else COLOURS.get(row.loss_effect.verdict(), NOISE) for row in ladder]
        panel = axes.pop(0)
        panel.plot(losses, lines, color=NOISE, linewidth=1, zorder=1)
        panel.errorbar(losses, lines, xerr=[spread(row.losses) for row in ladder], fmt="none", ecolor=INK, capsize=2.5,
                       linewidth=1, zorder=2)
        panel.scatter(losses, lines, color=colours, edgecolor=INK, linewidth=0.6, s=34, zorder=3)
        panel.set_title("loss with all rungs so far", color=INK, fontsize=11)
        panel.set_xlabel("validation loss, nats per token\n(bars: spread over seeds)", color=INK)
        panel = axes.pop(0)
        panel.barh(lines, times, xerr=[spread(row.seconds) for row in ladder], color="#7d9cc0", ecolor=INK, capsize=2.5,
                   height=0.66, error_kw={"linewidth": 1})
        panel.set_title("time with all rungs so far", color=INK, fontsize=11)
        panel.set_xlabel("seconds of training\n(bars: spread over seeds)", color=INK)
    if left_out:
        panel = axes.pop(0)
        panel.barh([place[row.rung.name] for row in left_out], [row.loss_effect.mean for row in left_out],
                   xerr=[error(row.loss_effect) for row in left_out], height=0.66, ecolor=INK, capsize=2.5,
                   color=[{"higher": BETTER, "lower": WORSE}.get(row.loss_effect.verdict(), NOISE) for row in left_out],
                   error_kw={"linewidth": 1})
        panel.axvline(0, color=INK, linewidth=0.8)
        panel.set_title("gpt2 without this one", color=INK, fontsize=11)
        panel.set_xlabel("change of its loss, nats\n(bars: standard error)", color=INK)
    for panel in figure.axes:
        panel.set_facecolor("white")
        panel.grid(axis="x", color="#dddddd", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.tick_params(colors=INK, labelsize=9)
        panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.axes[0].set_yticks(range(len(rungs)), [f"{rung.name}  {numbers(rung)}" for rung in rungs])
    figure.axes[0].set_ylim(len(rungs) - 0.4, -0.6)  # the first rung on top
    figure.suptitle(title, color=INK, fontsize=10)
    judged = any(row.loss_effect and not math.isnan(row.loss_effect.error) for row in ladder + left_out)
    figure.supxlabel("green: the technique lowers the loss, red: it raises it, by at least two standard errors; grey: "
                     "within noise" if judged else "one seed: no standard errors", color=INK, fontsize=9)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def processor() -> str:
    """The CPU's own name where Linux tells it, or what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


# ----------------------------------------------------------------------------------------------------------------------
# Command line.


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; python records/ladder.py --help lists all options")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
        return int(text)

    names = "\n".join(f"  {rung.name:18} {numbers(rung):22} {rung.what}" for rung in (START, *RUNGS))
    parser = Parser(description=__doc__, epilog=f"rungs:\n{names}", allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", metavar="|".join(SIZES),
                        help="small models (default), or the recipes as they are")
    parser.add_argument("--train-files", metavar="GLOB", help="training shards (default: those of train_gpt2.py)")
    parser.add_argument("--val-files", metavar="GLOB", help="validation shards (the same)")
    parser.add_argument("--steps", type=count, metavar="N",
                        help="length of the gpt2 recipe, whose tokens all runs get (default: 160, at 124M 1600)")
    parser.add_argument("--seeds", type=count, default=3, metavar="N", help="runs of each configuration (default: 3)")
    parser.add_argument("--rungs", metavar="A,B,...", help="only these, each compared with the one before it in the "
                        "list; none: leave-one-out alone (default: all)")
    parser.add_argument("--leave-one-out", action="store_true",
                        help="also gpt2 without each technique (of --rungs, where given)")
    parser.add_argument("--jobs", type=count, default=1, metavar="N",
                        help="runs at once; they share the cores, and on a GPU their times mean little (default: 1)")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="as train_gpt2.py has it")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: logs/ladder-SIZE")
    options = parser.parse_args(arguments)
    for flag, value, choices in (("--size", options.size, list(SIZES)),
                                 ("--device", options.device, ["auto", "cpu", "cuda"])):
        if value not in choices:
            raise UserError(f"{flag} {value} is not one of {', '.join(choices)}")
    known = [rung.name for rung in (START, *RUNGS)]
    options.chosen = [] if options.rungs == "none" else (options.rungs or ",".join(known)).split(",")
    for name in options.chosen:
        if name not in known:
            raise UserError(f"--rungs {name} is no rung (python records/ladder.py --help lists all)")
    if not options.chosen and not options.leave_one_out:
        raise UserError("--rungs none leaves nothing to run; give --leave-one-out as well")
    options.steps = options.steps or (160 if options.size == "tiny" else Config.steps)
    options.out = options.out or Path("logs") / f"ladder-{options.size}"
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if on_gpu else "cpu")
    defaults = Config(**preset_values("tiny" if options.size == "tiny" else "gpt2"))
    start, end = both_ends(options.size, device=device.type, out=str(options.out / "runs"), val_every=0,
                           train_files=options.train_files or defaults.train_files,
                           val_files=options.val_files or defaults.val_files,
                           **({} if on_gpu else {"head_dtype": "wide"}))  # float8 is a GPU's
    path = climb(start, end)
    idle = [rung.name for rung in RUNGS if rung not in [rung for rung, _ in path]]
    ladder = [(rung, rung.name) for rung, _ in path if rung.name in options.chosen]
    configs = {rung.name: config for rung, config in path if rung.name in options.chosen}
    left_out = []
    if options.leave_one_out:
        left_out = [(NOTHING, path[-1][0].name)]
        configs[path[-1][0].name] = end
        for rung, _ in path[1:]:
            if rung.name in options.chosen or not options.chosen:
                left_out.append((rung, f"without {rung.name}"))
                configs[left_out[-1][1]] = without(rung, start, end)
    if not configs:
        raise UserError(f"no rung is left: {', '.join(options.chosen)} change nothing at --size {options.size} on this "
                      "machine; give others")
    configs = dict(zip(configs, equal_budgets(list(configs.values()), end, options.steps), strict=True))
    for name, config in configs.items():
        try:
            check_config(config)
        except UserError as refusal:
            raise UserError(f"{name}: {refusal}") from None
    streams = open_data(replace(end, steps=options.steps))[:2]
    # Seed by seed, so that slow drifts of the machine meet all rungs alike and a broken-off command has whole ladders.
    runs = [Run(name, replace(config, seed=seed)) for seed in range(options.seeds) for name, config in configs.items()]
    threads = max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // options.jobs))
    machine = torch.cuda.get_device_name() if on_gpu else f"{processor()}, {threads} thread{'s' * (threads > 1)} a run"
    machine += f", {options.jobs} at once, torch {torch.__version__}, {for_device(end, Processes(0, 1, device))[0].dtype}"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        results = collect(runs, tuple(s.tokens for s in streams), options.jobs, threads, machine, options.out)
    except BrokenPipeError:
        raise UserError(f"nobody reads the progress any more, as behind `| head`; finished runs are in {options.out}/"
                      "runs.jsonl, the same command goes on from there") from None
    except OSError as error:
        raise UserError(f"cannot write to {options.out}: {error.strerror}; name a writable folder with --out") from None
    except KeyboardInterrupt:
        print(f"\ninterrupted: finished runs are in {options.out}/runs.jsonl; the same command goes on from there",
              file=sys.stderr)
        raise SystemExit(130) from None
    seeds = range(options.seeds)
    climbed, left_rows = rows_of(ladder, results, seeds), rows_of(left_out, results, seeds, path[-1][0].name)
    text = caption(options, end, results, idle)
    if climbed:
        text += "\n" + table(climbed, "rung", "to the one before") + "\n"
    if left_rows:
        text += "\n" + table(left_rows, "left out", "to the full recipe", explained=not climbed) + "\n"
    (options.out / "ladder.md").write_text(text, encoding="utf-8")
    draw(options.out / "ladder.png", climbed, left_rows, text.split(". Loss")[0])
    print(f"\n{text}\nwrote {options.out}/ladder.md and ladder.png")
    if len(results) < len(runs):
        raise UserError(f"{len(runs) - len(results)} of {len(runs)} runs failed, their lines say so; mend the cause, "
                      "then give the same command again")


def caption(options: argparse.Namespace, end: Config, results: dict, idle: list[str]) -> str:
    """What stands above the tables: data, size, budget, machine, and how to read the errors."""
    tokens = {result["tokens"] for result in results.values()}
    budget = " to ".join(f"{count:,}" for count in sorted({min(tokens), max(tokens)}))
    machines = "; ".join(sorted({result["machine"] for result in results.values()}))
    lines = [f"{options.size} on {Path(sorted(glob.glob(end.train_files))[0]).name}, {budget} training tokens, "
             f"{options.seeds} seed{'s' * (options.seeds > 1)}. Loss in nats per token after the last step; seconds of "
             f"training, without validation. {machines}; {datetime.date.today()}."]
    if options.seeds > 1:
        lines.append("Differences are means over seeds of differences within a seed. Within noise: less than two of "
                     "their standard errors. Where a technique does nothing, chance takes "
                     f"{100 * chance_beyond(2, options.seeds):.0f} % of the differences beyond that.")
    if idle:
        lines.append(f"Without effect at this size on this machine, so left out: {', '.join(idle)}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
