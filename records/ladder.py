"""The way from `five-minute` to `gpt2`, technique by technique, and `gpt2` with each technique left out.

    python records/ladder.py --train-files 'data/text/text_train_*.bin' --val-files 'data/text/text_val_*.bin' \\
        --steps 160 --seeds 3 --leave-one-out --jobs 2                  # small models, on a CPU with two cores
    python records/ladder.py --size 124M --leave-one-out                # the recipes themselves, on a GPU

A rung sets the fields of one technique to what `gpt2` has and keeps those of the rungs before it; the first
rung is `five-minute`, the last is `gpt2`. Left out is what a rung has set: it is as in `five-minute`. Every run
sees the same number of tokens, within 1 %: --steps is the length of `gpt2`. Schedules stretch. Differences are
between runs of one seed. Writes ladder.md, ladder.png and runs.jsonl, a line for each finished run, to --out:
what is there is not computed again, so the same command goes on where it was interrupted.
"""

import argparse
import datetime
import hashlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import torch
from scipy import stats
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train_gpt2
from train_gpt2 import TECHNIQUES, Config, Processes, UserError, comments, preset_values, tokens_until

# --------------------------------------------------------------------------------------------------
# Rungs. In: the two presets, at a size. Out: the configurations between them.


class Rung(NamedTuple):
    name: str
    reason: str
    records: str  # that brought it
    fields: tuple[str, ...]  # that it moves from their `five-minute` to their `gpt2` value


# Fields that make no sense alone move with a technique; some rungs are values only.
WITH = {"value_residual": "value-embeddings", "layers": "attention-free", "muon_lr": "normuon",
        "down_scale": "normuon", "unet_skips": "gated-skip", "adam_embedding": "tied-head", "adam_head": "tied-head",
        "tokens_per_step": "rate-levels", "row_tokens": "rate-levels", "steps": "rate-levels",
        "mixing": "sublayer-mixing", "adam_mixing": "sublayer-mixing"}
VALUES = {  # by the technique after which they came
    "short-windows": [Rung("epsilons", "smaller in Adam and in the norms", "20 21 57", ("adam_epsilon", "rms_epsilon")),
                      Rung("validation", "longer context in validation", "21 39", ("val_row_tokens", "val_every"))],
    "tied-head": [Rung("scalars", "Adam's settings for scalars", "52 57", ("adam_scalars",))]}


def all_rungs() -> list[Rung]:
    """Those of TECHNIQUES in the order of history, with values between them."""
    found, notes = [Rung("five-minute", "record 12", "12", ())], comments(quote='"')
    for name, neutral in TECHNIQUES.items():
        own = [field for field in neutral if WITH.get(field, name) == name]
        records, reason = notes[name].removeprefix("(").split(") ", 1)
        fields = (*dict.fromkeys(own + [field for field, moves_with in WITH.items() if moves_with == name]),)
        found += [Rung(name, reason, records, fields)] * bool(fields) + VALUES.get(name, [])
    return found


# The recipes made small: what both have, then what each has of its own. Learning rates stay. Rows and batches
# keep the ratios 4 to 1, 2, 3, windows and documents are an eighth. Six layers stand for eleven, {0,1} {2,3} {4,5}
# {6} {7,8,9} {10}: long windows in the second and the last, no attention in the fourth, which the skip enters. The
# softmax scale keeps its ratio to 1 / sqrt(K). Rows come from all over the text. Bytes have no prefixes.
TINY = ({"shuffle": True, "repeat": True, "long_documents": "continue", "val_tokens": 32_768, "layers": 6, "heads": 2,
         "width": 128, "window_short": (16, 48, 80, 96), "bigram_width": 32},
        {"tokens_per_step": (2048,), "row_tokens": (512,), "val_row_tokens": 512, "window": (127,)},
        {"tokens_per_step": (512, 1024, 1536), "row_tokens": (128, 256, 384), "val_row_tokens": 2048,
         "window": (48, 112, 176, 208), "window_final": 320, "document_tokens": (112, 256), "short_layers": (0, 2, 4),
         "paired_layers": (0, 2, 4), "attention_free": (3,), "attention_source": (2,), "xsa_layers": (0, 1, 2, 4, 5),
         "attention_scale": 0.1 * 2**0.5, "value_layers": (0, 1, 4, 5), "gated_skip": (1, 3), "bigram": 16,
         "qk_heads": 1, "prefix_weight": 0.0})
SIZES = {"tiny": TINY, "124M": ({}, {}, {})}


def both_ends(size: str = "124M", **common) -> tuple[Config, Config]:
    """The two recipes at a size, with `common` fields set in both."""
    both, *own = SIZES[size]
    return tuple(Config(**preset_values(preset) | both | values | common | {"preset": "gpt2"})
                 for preset, values in zip(("five-minute", "gpt2"), own, strict=True))


def climb(start: Config, end: Config) -> list[tuple[Rung, Config]]:
    """The configurations from one to the other. Rungs that change nothing here are left out."""
    first, *others = all_rungs()
    path = [(first, start)]
    for rung in others:
        config = replace(path[-1][1], **{field: getattr(end, field) for field in rung.fields})
        if config != path[-1][1]:
            path.append((rung, config))
    assert path[-1][1] == end, "a field that differs between the presets belongs to no rung"
    return path


def without(rung: Rung, start: Config, end: Config) -> Config:
    return replace(end, **{field: getattr(start, field) for field in rung.fields})


def equal_budgets(configs: dict[str, Config], end: Config, steps: int) -> dict[str, Config]:
    """Every configuration with the tokens that `end` sees in `steps`. Raises UserError where its batch is too
    large for that."""
    budget, found = tokens_until(steps, replace(end, steps=steps)), {}
    for name, config in configs.items():
        about = round(1000 * budget / tokens_until(1000, replace(config, steps=1000)))
        near = (replace(config, steps=count) for count in range(max(1, about - 3), about + 4))
        distances = {abs(tokens_until(c.steps, c) / budget - 1): c for c in near}
        if min(distances) > 0.01:
            raise UserError(f"--steps {steps} cannot give {name} the same tokens within 1 %, only within "
                            f"{100 * min(distances):.1f} %; give more")
        found[name] = distances[min(distances)]
    return found


# --------------------------------------------------------------------------------------------------
# Runs. In: configurations. Out: a line in runs.jsonl for each, as soon as it has ended.


class Run(NamedTuple):
    name: str
    config: Config  # with its seed

    def key(self, data: dict) -> str:
        """What makes a stored result this run's: its configuration, the data, the script."""
        settings = {**asdict(self.config), "out": None, "data": data}
        script = Path(train_gpt2.__file__).read_bytes()
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + script).hexdigest()[:16]


def train_once(config: Config, threads: int, output: Path, channel) -> None:
    """One run, in a process of its own; what it prints goes to a file. Sends what it found."""
    with open(output, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    tqdm.set_lock(threading.RLock())  # its own would be one between processes, which Ctrl-C leaves behind
    if config.device == "cpu":
        torch.set_num_threads(threads)
    folder = train_gpt2.train(config, train_gpt2.start_processes(config))
    (folder / "model.pt").unlink()  # hundreds of runs, and only their losses are asked for
    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    channel.send({"loss": last["val_loss"], "seconds": last["train_time_s"], "tokens": last["tokens"]})


def finish_all(runs: list[Run], jobs: int, threads: int, folder: Path) -> Iterator[tuple[Run, dict | None, Path]]:
    """Yield each run, what it found (None: it failed) and the file with its output, as they end. Each has its
    own process: no memory, compiler state or number of threads is passed on."""
    way = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(way)
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
    """The lines of runs.jsonl by their key; one that a crash cut off counts nothing."""
    found = {}
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            found[record["key"]] = record
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
    return found


def collect(runs: list[Run], data: dict, options: argparse.Namespace, threads: int,
            machine: str) -> dict[tuple[str, int], dict]:
    """The result of each run by (name, seed), stored or computed now. Raises UserError when runs keep failing."""
    path, failed = options.out / "runs.jsonl", 0
    stored, keys = stored_results(path), {run: run.key(data) for run in runs}
    missing = {keys[run]: run for run in reversed(runs) if keys[run] not in stored}  # equal ones once
    print(f"{len(set(keys.values()))} runs, {len(set(keys.values()) & set(stored))} of them in {path} already",
          flush=True)
    todo = [run for run in runs if missing.get(keys[run]) is run]
    for done, (run, result, output) in enumerate(finish_all(todo, options.jobs, threads, options.out), 1):
        label = f"{done}/{len(missing)} {run.name}, seed {run.config.seed}"
        if result is None:
            failed += 1
            lines = output.read_text(encoding="utf-8").splitlines() or ["it was killed"]
            print(f"{label}: failed: {lines[-1]} (all of it in {output})", flush=True)
            if failed == 3:
                raise UserError("three runs have failed; those finished are kept; mend the cause, then give the "
                                "same command again")
            continue
        record = {"key": keys[run], "name": run.name, "seed": run.config.seed, "steps": run.config.steps,
                  **result, "machine": machine}
        stored[keys[run]] = record
        cut_off = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n" * cut_off + json.dumps(record) + "\n")
        print(f"{label}: loss {result['loss']:.4f} in {result['seconds']:.1f} s of training", flush=True)
    return {(run.name, run.config.seed): stored[keys[run]] for run in runs if keys[run] in stored}


# --------------------------------------------------------------------------------------------------
# Table and picture. In: results. Out: Markdown and a PNG.


class Effect(NamedTuple):
    """A mean over seeds of differences within a seed, and its standard error; NaN where seeds are too few."""

    mean: float
    error: float

    def is_certain(self) -> bool:
        return abs(self.mean) >= 2 * self.error and self.mean != 0

    def text(self) -> str:
        if math.isnan(self.mean):
            return ""
        text = f"{self.mean:+.4f}" + f" ± {self.error:.4f}" * (not math.isnan(self.error))
        return f"**{text}**" if self.is_certain() else text


def effect(after: dict[int, float], before: dict[int, float]) -> Effect:
    """By seed: paired, so that what a seed does to both sides cancels."""
    differences = [after[seed] - before[seed] for seed in after if seed in before]
    spread = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.nan
    return Effect(statistics.fmean(differences) if differences else math.nan, spread)


class Row(NamedTuple):
    rung: Rung
    losses: dict[int, float]  # by seed, as the next
    seconds: dict[int, float]
    gain: Effect  # to the rung before
    omission: Effect  # of gpt2 without it, to gpt2


def rows_of(rungs: list[Rung], results: dict[tuple[str, int], dict]) -> list[Row]:
    def column(name: str, part: str = "loss") -> dict[int, float]:
        return {seed: result[part] for (other, seed), result in results.items() if other == name}

    before = ["", *(rung.name for rung in rungs)]
    return [Row(rung, column(rung.name), column(rung.name, "seconds"), effect(column(rung.name), column(last)),
                effect(column(f"without {rung.name}"), column("gpt2")))
            for rung, last in zip(rungs, before, strict=False)]


def mean_and_spread(values: dict[int, float], digits: int) -> str:
    if not values:
        return "failed"
    spread = f" ± {statistics.stdev(values.values()):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values.values()):.{digits}f}{spread}"


def table(rows: list[Row]) -> str:
    """Markdown. Bold: two standard errors and more."""
    lines = [["rung", "what", "records", "loss", "to the rung before", "seconds", "`gpt2` without it"],
             3 * ["---"] + 4 * ["--:"]]
    lines += [[*row.rung[:3], mean_and_spread(row.losses, 4), row.gain.text(), mean_and_spread(row.seconds, 1),
               row.omission.text()] for row in rows]
    width = 7 if some_left_out(rows) else 6
    return "\n".join(f"| {' | '.join(line[:width])} |" for line in lines)


def some_left_out(rows: list[Row]) -> bool:
    return any(math.isfinite(row.omission.mean) for row in rows)


GREEN, RED, GREY, INK = "#3a8f4d", "#c8553d", "#b4b4b4", "#222222"


def draw(path: Path, rows: list[Row], title: str) -> None:
    """Loss and time per rung beside each other, and what leaving that technique out does."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def colour(found: Effect, sign: int) -> str:  # sign: of an effect that speaks for the technique
        return GREY if not found.is_certain() else GREEN if found.mean * sign > 0 else RED

    def spread(values: dict[int, float]) -> float:
        return statistics.stdev(values.values()) if len(values) > 1 else 0.0

    rows = [row for row in rows if row.losses]
    lines, bars = range(len(rows)), {"height": 0.66, "ecolor": INK, "capsize": 2.5, "error_kw": {"linewidth": 1}}
    losses, seconds = ([statistics.fmean(part.values()) for part in column]
                       for column in zip(*((row.losses, row.seconds) for row in rows), strict=True))
    number = 3 if some_left_out(rows) else 2
    figure, panels = plt.subplots(1, number, figsize=(3.8 * number, 2.2 + 0.29 * len(rows)), sharey=True,
                                  facecolor="white", layout="constrained")
    panels[0].errorbar(losses, lines, xerr=[spread(row.losses) for row in rows], color=GREY, ecolor=INK, capsize=2.5)
    panels[0].scatter(losses, lines, color=[colour(row.gain, -1) for row in rows], edgecolor=INK, s=34, zorder=3)
    panels[1].barh(lines, seconds, xerr=[spread(row.seconds) for row in rows], color="#7d9cc0", **bars)
    for panel in panels[2:]:
        panel.barh(lines, [row.omission.mean for row in rows], color=[colour(row.omission, 1) for row in rows],
                   xerr=[0.0 if math.isnan(row.omission.error) else row.omission.error for row in rows], **bars)
        panel.axvline(0, color=INK, linewidth=0.8)
    for panel, (name, label) in zip(panels, (
            ("loss with all rungs so far", "validation loss, nats per token\n(bars: spread over seeds)"),
            ("time with all rungs so far", "seconds of training\n(bars: spread over seeds)"),
            ("gpt2 without this one", "change of its loss, nats\n(bars: standard error)")), strict=False):
        panel.set_title(name, color=INK, fontsize=11)
        panel.set_xlabel(label, color=INK)
        panel.grid(axis="x", color="#dddddd", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.tick_params(colors=INK, labelsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(lines, [f"{row.rung.name}  {row.rung.records}" for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)  # the first rung on top
    figure.suptitle(title, color=INK, fontsize=10)
    figure.supxlabel("green: the technique lowers the loss, red: it raises it, by two standard errors and more",
                     color=INK, fontsize=9)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


# --------------------------------------------------------------------------------------------------
# Command line.


def parse(arguments: list[str] | None) -> argparse.Namespace:
    rungs = "\n".join(f"  {rung.name:18} {rung.records:16} {rung.reason}" for rung in all_rungs())
    parser = train_gpt2.Parser(usage="python records/ladder.py [OPTIONS]", description=__doc__, allow_abbrev=False,
                               epilog=f"rungs:\n{rungs}", formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", default="tiny", choices=SIZES, help="small models, or the recipes as they are")
    add("--train-files", type=os.path.expanduser, metavar="GLOB", help="training shards (those of train_gpt2.py)")
    add("--val-files", type=os.path.expanduser, metavar="GLOB", help="validation shards (the same)")
    add("--steps", type=int, metavar="N", help=f"length of gpt2, whose tokens all get (160, at 124M {Config.steps})")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each configuration (3)")
    add("--rungs", metavar="A,B", help="only these, each compared with the one before it in the list (all)")
    add("--leave-one-out", action="store_true", help="also gpt2 without each of them")
    add("--jobs", type=int, default=1, metavar="N", help="runs at once, which share the cores (1)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="as train_gpt2.py has it")
    add("--out", type=Path, metavar="FOLDER", help="(logs/ladder-SIZE)")
    options = parser.parse_args(arguments)
    known = [rung.name for rung in all_rungs()]
    options.rungs = options.rungs.split(",") if options.rungs else known
    for name in options.rungs:
        if name not in known:
            parser.error(f"--rungs {name} is none of {', '.join(known)}")
    options.steps = (160 if options.size == "tiny" else Config.steps) if options.steps is None else options.steps
    if min(options.steps, options.seeds, options.jobs) < 1:
        parser.error("--steps, --seeds and --jobs must be at least 1")
    options.out = options.out or Path("logs") / f"ladder-{options.size}"
    return options


def machine_of(end: Config, threads: int, jobs: int) -> str:
    device = torch.device(end.device)
    about, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if end.device == "cuda":
        name = torch.cuda.get_device_name()
    elif about.exists():
        name = next((line.split(": ")[1] for line in about.read_text().splitlines() if "model name" in line), name)
    dtype = train_gpt2.for_device(end, Processes(0, 1, device))[0].dtype
    return f"{name}, {threads} thread(s) a run, {jobs} at once, torch {torch.__version__}, {dtype}"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    on_gpu = options.device == "cuda" or options.device == "auto" and torch.cuda.is_available()
    defaults = preset_values("tiny") if options.size == "tiny" else asdict(Config())
    start, end = both_ends(options.size, device="cuda" if on_gpu else "cpu", out=str(options.out / "runs"), val_every=0,
                           train_files=options.train_files or defaults["train_files"],
                           val_files=options.val_files or defaults["val_files"],
                           **{} if on_gpu else {"head_dtype": "wide"})  # float8 is a GPU's
    path = climb(start, end)
    rungs = [rung for rung, _ in path if rung.name in options.rungs]
    configs = {rung.name: config for rung, config in path if rung in rungs}
    if not configs:
        raise UserError(f"--rungs {','.join(options.rungs)}: none changes anything at --size {options.size} here")
    if options.leave_one_out:
        configs |= {"gpt2": end} | {f"without {rung.name}": without(rung, start, end) for rung in rungs if rung.fields}
    configs = equal_budgets(configs, end, options.steps)
    for name, config in configs.items():
        try:
            train_gpt2.check_config(config)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    data = train_gpt2.open_data(replace(end, steps=options.steps))
    # Seed by seed, so that slow drifts of the machine meet all rungs alike.
    runs = [Run(name, replace(config, seed=seed)) for seed in range(options.seeds) for name, config in configs.items()]
    threads = max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // options.jobs))
    machine = machine_of(end, threads, options.jobs)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        results = collect(runs, data.fingerprints, options, threads, machine)
    except OSError as error:
        raise UserError(f"cannot write to {options.out}: {error}; name a writable folder with --out") from None
    except KeyboardInterrupt:
        print(f"\ninterrupted: finished runs are in {options.out}/runs.jsonl; the same command goes on",
              file=sys.stderr)
        raise SystemExit(130) from None
    rows, idle = rows_of(rungs, results), [r.name for r in all_rungs() if r not in [rung for rung, _ in path]]
    title = (f"{options.size} on {Path(end.train_files).name}, {max(r['tokens'] for r in results.values()):,} training "
             f"tokens, {options.seeds} seed(s), {'; '.join(sorted({r['machine'] for r in results.values()}))}; "
             f"{datetime.date.today()}")
    text = (f"{title}. Loss in nats per token after the last step; seconds of training. Left out, as they change "
            f"nothing here: {', '.join(idle)}.\n")
    if options.seeds > 1:
        text += ("Differences are means over seeds of differences within a seed, bold from two standard errors on; "
                 f"chance gives {200 * stats.t.sf(2, options.seeds - 1):.0f} % of those where nothing is there.\n")
    text += "\n" + table(rows) + "\n"
    (options.out / "ladder.md").write_text(text, encoding="utf-8")
    draw(options.out / "ladder.png", rows, title)
    print(f"\n{text}\nwrote {options.out}/ladder.md and ladder.png")
    if len(results) < len(runs):
        raise UserError(f"{len(runs) - len(results)} of {len(runs)} runs failed, their lines say so; mend the cause, "
                        "then give the same command again")


if __name__ == "__main__":
    main()
