"""Reads logs of runs and says what they are worth. A RUN is a run folder, a folder of such folders, a log file, a
pattern in quotes, or several of these joined by commas. Logs of the public speedrun are read as well as our own.

    python records/report.py show RUN...                     # a table of runs, and the settings that differ
    python records/report.py verify --target 3.28 RUN...     # is this a record? status 0: yes, 1: no
    python records/report.py compare A B                     # B against A, with 95 % intervals
    python records/report.py plot OUT.png RUN...             # losses, reference curves, history of the record
    python records/report.py band RUN                        # is it on track? status 0: yes, 1: no

Bad input ends every command with one line and status 2. `--help` after a command lists its options.
"""

import argparse
import contextlib
import csv
import glob
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
TARGET, VAL_TOKENS = 3.28, 10_485_760  # of the speedrun on FineWeb
STEP = re.compile(r"step:(\d+)/(\d+)(?: (train|val)_loss:(\S+))?(?: val_\w+_loss:\S+)*"
                  r" train_time:([\d.]+|nan)(m?s) step_avg:(\S+)ms")
LLMC = re.compile(r"s:(\d+) (tel|trl):(\S+).*")  # llm.c, and the speedrun in June 2024
RULE = re.compile(r"^={60,}$", re.MULTILINE)  # follows the source; in logs of 2024 one precedes it as well
SMI_ROW = re.compile(r"^\|\s+\d+\s+(\S[^|]*?)\s+(?:On|Off)\s+\|", re.MULTILINE)  # one GPU of nvidia-smi's table
NOT_RECIPE = ("seed", "out", "resume", "save_every", "keep", "patience")  # settings that leave training as it is


class UserError(SystemExit):
    """One line for the user."""


Run = SimpleNamespace  # what a log holds, as read_log fills it; empty where the log does not say


class Point(NamedTuple):
    step: int
    tokens: int | None  # None: unknown
    seconds: float  # NaN: unknown
    loss: float


def whole(text: str) -> int:
    """Raises ValueError for a number beyond all runs, with which nothing can be computed."""
    if abs(int(text)) > 1e15:
        raise ValueError(text)
    return int(text)


def parse(text: str, path: Path) -> tuple[dict[str, dict], dict]:
    """(kind -> step -> value, settings) of a log.txt or metrics.jsonl. Kinds: train, val, step, resumed."""
    records, config, garbled = [], {}, 0
    for line in text.split("\n"):
        if found := LLMC.fullmatch(line):
            kind = "val" if found[2] == "tel" else "train"
            line = f"step:{found[1]}/0 {kind}_loss:{found[3]} train_time:nanms step_avg:nanms"
        try:
            if found := STEP.match(line):
                step, planned, kind, loss, time, unit, average = found.groups()
                step, seconds = whole(step), float(time) / (1000 if unit == "ms" else 1)
                records.append(("step", step, (whole(planned), seconds, float(average))))
                if kind:
                    records.append((kind, step, Point(step, None, seconds, float(loss))))
            elif found := re.match(r"resumed after step (\d+) ", line):
                records.append(("resumed", whole(found[1]), None))
            elif path.suffix == ".jsonl" and line:
                record = json.loads(line)
                step, kind = whole(record["step"]), "val" if "val_loss" in record else "train"
                seconds, loss = float(record["train_time_s"]), float(record[f"{kind}_loss"])
                records.append((kind, step, Point(step, whole(record["tokens"]), seconds, loss)))
            elif line.startswith("{"):
                config |= {name: str(value) if isinstance(value, (list, dict)) and name in ("seed", "preset") else value
                           for name, value in json.loads(line).items()}
            else:
                garbled += line.startswith(("step:", "\0"))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            garbled += 1
    if garbled and records:
        print(f"notice: skipped {garbled} garbled line{'s' * (garbled > 1)} of {path}", file=sys.stderr)
    kept, lowest = {"step": {}, "train": {}, "val": {}, "resumed": {}}, math.inf
    for kind, step, value in reversed(records):
        if step <= lowest:  # a resumed run takes back what it repeats, and all that was beyond
            lowest = step
            kept[kind].setdefault(step, value)
    return kept, config


def read_log(path: Path, batch: int = 0) -> Run | None:
    """None: no step of a run is in it. batch: tokens per step, for logs that do not state it."""
    text = re.sub(r"\A={60,}\n", "", path.read_text(encoding="utf-8-sig", errors="replace"))
    source, text = RULE.split(text, 1) if RULE.search(text) else ("", text)
    metrics = path.with_name("metrics.jsonl")
    kept, config = parse(text, path)
    if not kept["step"]:
        return None
    steps, (planned, seconds, average) = max(kept["step"].items())
    planned = planned or steps  # llm.c does not state it
    twin = path.name == "log.txt" and metrics.is_file()
    exact = parse(metrics.read_text(encoding="utf-8-sig", errors="replace"), metrics)[0] if twin else kept
    losses = {"train": [], "val": []}
    for kind, points in losses.items():
        for step, point in sorted((kept[kind] | exact[kind]).items()):
            if abs(kept[kind].get(step, point).loss - point.loss) > 2e-4:
                raise UserError(f"{path} and metrics.jsonl have different {kind}_loss at step {step}")
            if point.tokens is None and batch:
                point = point._replace(tokens=step * batch)
            points.append(point)
            if step >= steps:
                steps, seconds = step, point.seconds

    def first(pattern: str) -> str:
        found = re.search(pattern, text, re.MULTILINE)
        return found[1] if found else ""

    cards, (train, val) = SMI_ROW.findall(text), losses.values()
    return Run(
        path=path, name=path.stem, config=config, seed=config.get("seed"),
        planned=planned, steps=steps, finished=steps == planned and (not val or val[-1].step == planned),
        train=train, val=val, points=val or train, seconds=seconds,
        average=1000 * seconds / max(1, steps) if math.isnan(average) else average,  # milliseconds per step
        script=hashlib.sha256(source.removesuffix("\n").encode()).hexdigest()[:12] if source else "",
        hardware=f"{len(cards)} x {cards[0]}" if cards else first(r"^(CPU, .*|\d+ x \S.*)$") or first(r"(\d+ cores)"),
        torch=first(r"\b(?:[Pp]y)?[Tt]orch (?:version )?(\d[^\s,]*)"),
        on_fineweb=not config or "fineweb" in str(config.get("train_files")).lower(),  # public logs are
        val_targets=first(r"^notice: .*?([\d,]+) targets"),  # stated where the validation set is short
        shards=re.sub(  # names, sizes and checksums, in lists or texts, once nested by part
            r'"(train|val)": \{|(train|val) shard |[][" }]', "", first(r"^shards (\{.*)$")))


def logs_at(path: Path) -> list[Path]:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is not a regular file")
    if not path.is_dir() or (path / "log.txt").is_file():
        return [path / "log.txt" if path.is_dir() else path]
    return sorted(log for log in path.rglob("*") if log.suffix in (".txt", ".log") and log.is_file())


def read_runs(words: list[str], batch: int = 0, skip: bool = False) -> list[Run]:
    """Each run that the words name, once. skip: leave out with a notice what cannot be read."""
    runs: dict[Path, Run | None] = {}
    for word in filter(None, ",".join(words).split(",")):
        paths = sorted(glob.glob(os.path.expanduser(word))) or [word]
        logs = [log.resolve() for path in paths for log in logs_at(Path(path))]
        for log in logs:
            try:
                runs[log] = runs[log] if log in runs else read_log(log, batch)
            except (UserError, OSError) as error:
                if not skip:
                    raise
                print(f"notice: skipped: {error}", file=sys.stderr)
        if not skip and not any(runs[log] for log in logs):
            raise UserError(f"{word} holds no log of a run; `ls logs` lists the runs made here")
    found = [run for run in runs.values() if run]
    if not found:
        raise UserError("no run to read; `ls logs` lists the runs made here")
    folders = [run.path.parent if run.path.name == "log.txt" else run.path.with_suffix("") for run in found]
    above = os.path.commonpath([folder.parent for folder in folders])
    for run, folder in zip(found, folders, strict=True):
        run.name = str(folder.relative_to(above))
    return found


def differing_settings(runs: list[Run]) -> dict[str, list]:
    """Setting -> its values in the runs that state settings, where these differ."""
    configs = [run.config for run in runs if run.config]
    names = dict.fromkeys(name for config in configs for name in config if name not in NOT_RECIPE)
    values = {name: [config.get(name, "absent") for config in configs] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def table(rows: list[list[str]]) -> str:
    """Markdown, aligned; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.rjust(width) if re.fullmatch(r"[+-]?[\d,.]+", cell) else cell.ljust(width)
              for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(options: argparse.Namespace) -> int:
    runs = read_runs(options.runs, options.tokens_per_step)
    rows = [["run", "seed", "steps", "tokens", "seconds", "ms/step", "final loss", "hardware", "torch", "script"]]
    for run in runs:
        last = run.points[-1] if run.points else Point(0, None, math.nan, math.nan)
        tokens = max((point.tokens or 0 for point in run.train + run.val), default=0)
        note = "" if run.val and run.finished else f" ({'val' if run.val else 'train'}, step {last.step})"
        rows.append([run.name, "" if run.seed is None else f"{run.seed}",
                     f"{run.steps}" if run.finished else f"{run.steps}/{run.planned}", f"{tokens:,}" if tokens else "",
                     f"{run.seconds:.2f}", f"{run.average:.2f}", f"{last.loss:.4f}{note}", run.hardware, run.torch,
                     run.script])
    print(table(rows))
    different = differing_settings(runs)
    if different:
        columns = {}  # runs with the same values share that of the first one
        for name, *values in zip((run.name for run in runs if run.config), *different.values(), strict=True):
            columns.setdefault(tuple(json.dumps(value).strip('"') for value in values), name)
        print("\nSettings that differ:\n")
        print(table([["setting", *columns.values()], *map(list, zip(different, *columns, strict=True))]))
    return 0


# Standard deviation of the final losses of single runs. gpt2: the rules of the public optimizer track; records 41 to 89
# show 0.0010 to 0.0015. five-minute: stated with record 12. tiny: our three hundred-second runs.
KNOWN_SPREAD = {"gpt2": 0.0013, "five-minute": 0.005, "tiny": 0.0094}


def warn(checks: dict[str, object]) -> list[str]:
    found = [text for text, holds in checks.items() if holds]
    for text in found:
        print(f"warning: {text}")
    return found


def rule_breaks(runs: list[Run], planned: int | None, target: float) -> tuple[list[str], list[str]]:
    """Warns. Returns (what makes the answer no, what could not be checked)."""
    seeds = [run.seed for run in runs if run.seed is not None]
    curves = [tuple(point.loss for point in run.points if point.step) for run in runs if len(run.points) > 2]
    short = ", ".join(run.name for run in runs if not run.finished)
    names = [*differing_settings(runs)] + ["shards"] * (len({run.shards for run in runs if run.shards}) > 1)
    names += ["validation targets"] * (len({run.val_targets for run in runs if run.config}) > 1)
    speedrun = all(run.on_fineweb and not run.val_targets and run.config.get("val_tokens", VAL_TOKENS) == VAL_TOKENS
                   for run in runs)
    return warn({
        f"not finished: {short}": short,
        "a loss is not finite": not math.isfinite(sum(point.loss for run in runs for point in run.val)),
        "a seed is used more than once": len(set(seeds)) < len(seeds),
        "two runs have the same losses: one is counted twice": len(set(curves)) < len(curves),
        f"{planned} runs were planned, {len(runs)} are here": planned not in (None, len(runs)),
        "the scripts differ": len({run.script for run in runs if run.script}) > 1,
        f"data or settings differ: {', '.join(names)}": names,
        "the numbers of steps differ": len({run.planned for run in runs}) > 1,
        f"the target {TARGET} is for the first {VAL_TOKENS:,} validation tokens of FineWeb, these runs have others; "
        "name the --target of their data": target == TARGET and not speedrun,
    }), warn({
        f"{len(runs) - len(seeds)} of {len(runs)} logs state no seed": len(seeds) < len(runs),
        "the number of runs planned is not stated (--planned N)": planned is None,
        "a log holds no source": not all(run.script for run in runs),
        "the machines differ: their times do not compare": len({run.hardware for run in runs}) > 1})


def p_values(losses: list[float], target: float, known: float) -> tuple[float, float, float]:
    """p of so low a mean if the true one is the target, by the t-test and by the known spread; the sample's spread."""
    from scipy import stats
    spread = max(np.std(losses, ddof=1), 1e-12) if len(losses) > 1 else math.nan
    distance = (np.mean(losses) - target) * len(losses) ** 0.5
    return stats.t.cdf(distance / spread, len(losses) - 1), stats.norm.cdf(distance / known), spread


def verify(options: argparse.Namespace) -> int:
    runs, target, alpha = read_runs(options.runs), options.target, options.alpha
    finished = [run for run in runs if run.finished]
    if not finished or not all(run.val for run in runs):
        raise UserError("expected finished runs with a val_loss after the last step")
    losses, seconds = [run.val[-1].loss for run in finished], [run.seconds for run in finished]
    margin = target - np.mean(losses)
    known = options.spread or KNOWN_SPREAD.get(finished[0].config.get("preset"), KNOWN_SPREAD["gpt2"])
    by_t, by_known, spread = p_values(losses, target, known)
    print(f"runs     {len(losses)}, final losses {', '.join(f'{loss:.4f}' for loss in losses)}")
    print(f"mean     {np.mean(losses):.5f}, {-margin:+.5f} from the target {target:g}")
    print(f"spread   {spread:.5f} in this sample, {known:g} assumed known")
    print(f"p        {by_t:.2g} by the t-test, {by_known:.2g} with the known spread; both must be below {alpha:g}")
    print(f"time     {np.mean(seconds):.2f} s on average, {min(seconds):.2f} to {max(seconds):.2f}")
    against, unknown = rule_breaks(runs, options.planned, target)
    reasons = [text for text, holds in {
        "rules are broken, see the warnings": against,
        "the mean is not below the target": margin <= 0,
        f"p is not below {alpha:g} by both tests; more runs decide": not (by_t < alpha and by_known < alpha),
    }.items() if holds]
    print(f"no: {'; '.join(reasons)}" if reasons else "yes: the mean is below the target by both tests"
          + ", as far as the warnings allow" * bool(unknown))
    return 1 if reasons else 0


def loss_at(points: list[Point], place: int, axis: str) -> float:
    """The loss at so many steps or tokens, linear between two points; NaN outside."""
    places = [getattr(point, axis) for point in points]
    return float(np.interp(place, places, [point.loss for point in points], math.nan, math.nan))


def seconds_to(points: list[Point], loss: float) -> float:
    """When a run first reached this loss, linear between two points; NaN: never."""
    lowest = np.minimum.accumulate([point.loss for point in points])
    return float(np.interp(-loss, -lowest, [point.seconds for point in points], right=math.nan))


def difference(a: list[float], b: list[float], paired: bool) -> list[str]:
    """Mean of b minus mean of a, its 95 % interval, and what that says. Not paired: Welch's interval."""
    from scipy import stats
    mean = f"{np.mean(b) - np.mean(a):+.4f}"
    if min(len(a), len(b)) < 2:
        return [mean, "", ""]
    with warnings.catch_warnings(action="ignore"):  # scipy's, where all values are equal
        test = stats.ttest_rel(b, a) if paired else stats.ttest_ind(b, a, equal_var=False)
    low, high = test.confidence_interval(0.95)
    verdict = "B is lower" if high < 0 else "B is higher" if low > 0 else "within the noise"
    return [mean, f"{low:+.4f} to {high:+.4f}", verdict]


def compare(options: argparse.Namespace) -> int:
    sets = [read_runs([word], options.tokens_per_step) for word in (options.a, options.b)]
    both = sets[0] + sets[1]
    if not all(run.points for run in both) or len({bool(run.val) for run in both}) > 1:
        raise UserError("expected losses in all runs, and a val_loss in all or in none")
    for name, word, runs in zip("AB", (options.a, options.b), sets, strict=True):
        runs.sort(key=lambda run: (type(run.seed).__name__, run.seed is not None and run.seed))
        print(f"{name}: {word}, {len(runs)} of {runs[0].planned} steps")
    seeds = [[run.seed for run in runs] for runs in sets]
    paired = seeds[0] == seeds[1] and None not in seeds[0] and len(set(seeds[0])) == len(seeds[0])
    print("no intervals for a single run: give several seeds" if min(map(len, sets)) < 2 else
          f"paired by seed: {', '.join(map(str, seeds[0]))}" if paired else "not paired: Welch's intervals")
    warn({"no validations: training losses of single batches are compared": not both[0].val,
          "the numbers of steps differ, so do schedules at equal tokens": len({run.planned for run in both}) > 1,
          "the shards differ: neither losses nor times compare": len({run.shards for run in both if run.shards}) > 1,
          "the machines differ: their times do not compare": len({run.hardware for run in both}) > 1,
          "some runs are not finished": not all(run.finished for run in both)})
    axis = "tokens" if all(point.tokens is not None for run in both for point in run.points) else "step"
    common = set.intersection(*({getattr(point, axis) for point in run.points} for run in both)) - {0}
    common = sorted(common or {min(getattr(run.points[-1], axis) for run in both)})
    loss = options.loss or max(run.points[-1].loss for run in both)
    values = {f"loss at {axis} {place:,}": lambda run, place=place: loss_at(run.points, place, axis)
              for place in sorted({common[round(part * (len(common) - 1) / 5)] for part in range(6)})}
    values[f"seconds to a loss of {loss:.4f}"] = lambda run: seconds_to(run.points, loss)
    values["milliseconds per step"] = lambda run: run.average
    rows = [["", "A", "B", "B - A", "95 % interval", ""]]
    for what, value in values.items():
        a, b = ([value(run) for run in runs] for runs in sets)
        if not all(map(math.isfinite, a + b)):
            rows.append([what, *(f"{np.isfinite(x).sum()} of {len(x)}" for x in (a, b)), "", "", "not in all runs"])
        else:
            rows.append([what, f"{np.mean(a):.4f}", f"{np.mean(b):.4f}", *difference(a, b, paired)])
    print(f"\n{table(rows)}")
    return 0


# The curve that a preset follows: a record, or the run of a larger model. gpt2 was record 62 while it had 1600 steps.
REFERENCE = {"five-minute": ["12"], "gpt2": ["88", "62"], "gpt2-medium": ["gpt2-medium"], "gpt2-xl": ["gpt2-xl"]}
# Standard deviation of the final losses of several runs. gpt2-xl: how far two runs lie apart at equal rates.
END_SPREAD = {"12": 0.005, "21": 0.0019, "40": 0.0011, "62": 0.0013, "88": 0.0014, "89": 0.0015,
              "gpt2-medium": 0.0009, "gpt2-xl": 0.002}
RANGE_OF_SIX = 2.534  # mean range of six normal draws, in standard deviations
WIDTH = 4  # of the band to each side, in standard deviations
# (share of the run, how many times wider runs spread before it): as public logs show for a batch of one size (records
# 14, 39, 40) and for one that grows (61, 62, 89).
CONSTANT, GROWING = ((0.2, 6), (0.5, 3), (1.1, 1)), ((0.5, 12), (0.75, 4), (1.1, 2))
OWN_RUNS = HERE / "2026-11-26_tiny_two_layers_2-core_cpu"  # what `tiny` is compared with


def reference_curves() -> dict[str, list[dict]]:
    """Record, or name of a larger model, -> its rows of curves.csv; None where nothing is stated."""
    curves = {}
    with open(HERE / "curves.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            numbers = {name: float(text) if text else None for name, text in row.items() if name != "record"}
            curves.setdefault(row["record"], []).append(numbers)
    return curves


def record_band(record: str) -> dict[int, tuple[float, float]]:
    """Step -> (middle, half width)."""
    rows, band = reference_curves()[record], {}
    wider = CONSTANT if record in ("12", "21", "40", "gpt2-xl") else GROWING
    for row in rows:
        middle, spread = row["loss"], row["sd"]  # of twenty runs
        if spread is None and row["lowest"]:  # the range of six is known
            middle = (row["highest"] + row["lowest"]) / 2
            spread = max(END_SPREAD[record], (row["highest"] - row["lowest"]) / RANGE_OF_SIX)
        elif spread is None:
            spread = END_SPREAD[record] * next(x for share, x in wider if row["step"] < share * rows[-1]["step"])
        band[int(row["step"])] = middle, WIDTH * spread
    return band


def runs_band(runs: list[Run]) -> dict[int, tuple[float, float]]:
    """The same around the mean of runs. A few may agree by chance: no step's variance counts less than the mean one."""
    curves = [{point.step: point.loss for point in run.val} for run in runs]
    losses = {step: [curve[step] for curve in curves] for step in sorted(set.intersection(*map(set, curves)))}
    variances = {step: np.var(values, ddof=1) for step, values in losses.items()}
    least = np.mean([value for step, value in variances.items() if step] or [0.0])
    return {step: (np.mean(values), WIDTH * (max(least, variances[step]) * (1 + 1 / len(runs))) ** 0.5)
            for step, values in losses.items()}


def forecast(run: Run) -> str:
    """What a run of record 88's recipe at step 1000 can expect; "" before that, and at its end."""
    loss = None if run.finished else next((point.loss for point in run.val if point.step == 1000), None)
    if loss is None:
        return ""
    verdict = "a pass" if loss <= 3.459 else "too close to tell" if loss <= 3.463 else "a miss"
    return f"; 20 runs fell by 0.1774 to 0.1820 after step 1000, so {loss - 0.1794:.4f} is expected: {verdict}"


def compared_with(run: Run, options: argparse.Namespace) -> tuple[str, dict, str]:
    """(what the run is compared with, its band, what is to be expected of it)."""
    preset = run.config.get("preset")
    if options.against or (preset == "tiny" and not options.record):
        name = options.against or f"records/{OWN_RUNS.name}"
        others = [other for other in read_runs([options.against or str(OWN_RUNS)]) if other.path != run.path]
        if len(others) < 2:
            raise UserError(f"{name} holds {len(others)} other runs; two or more are needed")
        if {(other.planned, other.val_targets) for other in others} != {(run.planned, run.val_targets)}:
            raise UserError(f"{run.name} has other steps or validation data than {name}; give --against FOLDER")
        different = [name for name, values in differing_settings([run, *others]).items() if "absent" not in values]
        warn({f"settings differ: {', '.join(different)}": different})
        return f"{len(others)} runs of {name}", runs_band(others), ""
    records = [options.record] if options.record else REFERENCE.get(preset)
    if not records:
        raise UserError(f"{run.name} has no preset with a curve; give --record or --against")
    curves = {name: {row["step"]: row["tokens"] for row in reference_curves()[name]} for name in records}
    record = next((name for name, curve in curves.items() if max(curve) == run.planned), None)
    if record is None:
        raise UserError(f"{run.name} has {run.planned} steps, the curve of {records[0]} {max(curves[records[0]]):.0f}: "
                        "schedules differ; compare runs of the same --steps with --against FOLDER")
    curve = curves[record]
    warn({"the reference was trained on FineWeb, this run was not": not run.on_fineweb,
          "the reference has seen other numbers of tokens at the same steps": any(
              point.tokens and curve.get(point.step) not in (None, point.tokens) for point in run.val)})
    return f"the curve of {record}", record_band(record), forecast(run) if record == "88" else ""


def band(options: argparse.Namespace) -> int:
    run, *more = read_runs([options.run])
    if more:
        raise UserError(f"{options.run} holds {1 + len(more)} runs; give one")
    what, limits, outlook = compared_with(run, options)
    rows, inside = [["step", "val_loss", "band", ""]], []
    for point in run.val:
        if point.step in limits:
            middle, half = limits[point.step]
            inside.append(abs(point.loss - middle) <= half)  # false for NaN
            place = "inside" if inside[-1] else "below" if point.loss < middle else "above"
            rows.append([f"{point.step}", f"{point.loss:.4f}", f"{middle - half:.4f} to {middle + half:.4f}", place])
    if not inside:
        raise UserError(f"{run.name} has no val_loss at a step of the reference ({', '.join(map(str, limits))})")
    print(f"{run.name} against {what}, {WIDTH} standard deviations to each side\n\n{table(rows)}")
    on_track = all(inside) and not outlook.endswith("a miss")
    print(f"\n{'yes' if on_track else 'no'}: {sum(inside)} of {len(inside)} validations are inside the band"
          + f", at step {run.steps} of {run.planned}" * (not run.finished) + outlook)
    return 0 if on_track else 1


STYLES = ("-", "--", ":", "-.")


def run_lines(runs: list[Run]) -> list[tuple[list[Point], dict]]:
    """(points, how they are drawn): colour by recipe, style by seed. Few validations make no line: of such a run
    training losses are drawn."""
    lines, recipes = [], []
    for run in runs:
        settings = [(name, value) for name, value in run.config.items() if name not in NOT_RECIPE]
        recipes.append([run.script, run.planned, settings])
        number, place = recipes.index(recipes[-1]), recipes.count(recipes[-1]) - 1
        label = f"{run.config.get('preset')}, {run.planned} steps, seed {run.seed}" if run.config else run.name[-40:]
        label += f" ({run.name[-40:]})" * (label in [look["label"] for _, look in lines])
        few = len(run.val) < 4 and len(run.train) > len(run.val)
        label += ", training" * few
        look = {"label": label, "color": f"C{number % 10}", "linestyle": STYLES[place % 4],
                "marker": "os^vD"[place % 5], "markersize": 3}
        lines.append((run.train if few else run.points, look))
    return lines


def reference_lines() -> list[tuple[list[Point], dict]]:
    """The same for public records, in grey. Where only the end's seconds are known, they go evenly over the steps."""
    lines = []
    for place, record in enumerate(("12", "21", "40", "62", "88")):
        rows = reference_curves()[record]
        pace = rows[-1]["seconds"] / rows[-1]["step"]
        points = [Point(row["step"], row["tokens"], row["seconds"] or pace * row["step"], row["loss"]) for row in rows]
        lines.append((points, {"label": f"record {record}, {points[-1].seconds:.0f} s on 8 H100", "zorder": 1,
                               "color": f"{0.4 + 0.1 * place}", "linestyle": STYLES[place % 4]}))
    return lines


def draw_losses(panel, lines: list[tuple[list[Point], dict]], axis: str, unit: float, name: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter
    for points, look in lines:
        places = [(getattr(point, axis) / unit, point.loss) for point in points
                  if point.step and getattr(point, axis) and math.isfinite(getattr(point, axis) + point.loss)]
        panel.plot(*zip(*places, strict=True) if places else ((), ()), markevery=max(1, len(places) // 20), **look)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    panel.xaxis.set_major_formatter("{x:,g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set(title=f"loss over {axis}, where known", xlabel=name, ylabel="loss, nats per token")


def draw_history(panel) -> None:
    with open(HERE / "history.csv", encoding="utf-8", newline="") as file:
        rows = [(np.datetime64(row["date"]), float(row["seconds"]), row["record"]) for row in csv.DictReader(file)]
    panel.step([row[0] for row in rows], [row[1] for row in rows], where="post", marker="o", markersize=3)
    for day, seconds, name in rows:
        if name in ("12", "15", "29", "40", "53", "62", "81", "89"):
            panel.annotate(f"#{name} {seconds:g} s", (day, seconds), (8, 8), textcoords="offset points")
    panel.set(title=f"the record, #{rows[0][2]} to #{rows[-1][2]}, 8 H100 to a loss of 3.28", ylim=(0, 350),
              ylabel="seconds of training", xlim=(rows[0][0], rows[-1][0] + np.timedelta64(60, "D")))


def plot(options: argparse.Namespace) -> int:
    import matplotlib
    from matplotlib.figure import Figure
    if options.out.suffix.lower() != ".png":
        raise UserError(f"{options.out} does not end in .png; the picture's name comes before the runs")
    runs = read_runs(options.runs, options.tokens_per_step, skip=True) if options.runs else []
    whole = [run for run in runs if run.finished and run.points] or [run for run in runs if run.points]
    for run in runs:
        if run not in whole:
            print(f"notice: skipped {run.name}: interrupted at step {run.steps} of {run.planned}", file=sys.stderr)
    public = all(run.on_fineweb for run in whole)
    matplotlib.rcParams.update({"text.parse_math": False, "axes.grid": True, "grid.color": "#e2e2e2", "font.size": 9,
                                "axes.axisbelow": True, "axes.titlelocation": "left"})
    figure = Figure(figsize=(11, 8.6 if public else 5.2), layout="constrained")
    panels = figure.subplot_mosaic([["time", "tokens"]] + [["history", "history"]] * public)
    lines = run_lines(whole) + (reference_lines() if public else [])
    draw_losses(panels["time"], lines, "seconds", 1, "seconds of training")
    draw_losses(panels["tokens"], lines, "tokens", 1e6, "millions of training tokens")
    if public:
        draw_history(panels["history"])
        figure.supxlabel("grey: logs of the public speedrun's records; times within #12, #21 and #40 are taken as even "
                         "over their steps, #88 is the runs of its contributor", fontsize=9)
    figure.legend(*panels["time"].get_legend_handles_labels(), loc="outside upper center", frameon=False, ncols=3)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_suffix(".partial.png")  # a picture that is there stays until the new one is whole
    try:
        figure.savefig(partial, dpi=110)
        os.replace(partial, options.out)
    finally:
        partial.unlink(missing_ok=True)
    print(f"wrote {options.out}: {len(whole)} runs, {'with' if public else 'without'} reference curves")
    return 0


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; {self.prog} --help lists what it takes")


def positive(text: str) -> float:
    """Raises ValueError for what is no finite number above 0: a verdict by it would mean nothing."""
    if not 0 < (number := float(text)) < math.inf:
        raise ValueError
    return number


def count(text: str) -> int:
    """Raises ValueError for what is no whole number above 0."""
    return int(text) if positive(text) else 0


def parse_command_line(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python records/report.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="show|verify|compare|plot|band", required=True)

    def command(action, text: str):
        part = commands.add_parser(action.__name__, help=text, description=text, allow_abbrev=False)
        part.set_defaults(action=action)
        if action in (show, compare, plot):
            part.add_argument("--tokens-per-step", type=count, default=0, metavar="N",
                              help="for logs that do not state it, where it is the same in all steps")
        return part.add_argument

    add = command(show, "a table of runs, and the settings that differ")
    add("runs", nargs="+", metavar="RUN")
    add = command(verify, "is the mean of the final losses below the target? status 0: yes, 1: no")
    add("runs", nargs="+", metavar="RUN")
    add("--target", type=positive, default=TARGET, metavar="LOSS", help="default: %(default)s")
    add("--planned", type=count, metavar="N", help="number of runs fixed before the first one")
    add("--spread", type=positive, metavar="S", help="known standard deviation of the final losses (default: "
        f"{', '.join(f'{name} {value:g}' for name, value in KNOWN_SPREAD.items())})")
    add("--alpha", type=positive, default=0.01, metavar="P", help="both p must be below (default: %(default)s)")
    add = command(compare, "B minus A with 95 %% intervals, paired where the seeds are the same")
    add("a", metavar="A", help="a folder of runs, a pattern, or runs joined by commas")
    add("b", metavar="B", help="the same")
    add("--loss", type=positive, help="for the time to a loss (default: the highest final one)")
    add = command(plot, "a picture: loss over time and tokens, public records and their history")
    add("out", type=Path, metavar="OUT.png")
    add("runs", nargs="*", metavar="RUN")
    add = command(band, "is a run, finished or not, on track? status 0: yes, 1: no")
    add("run", metavar="RUN")
    add("--record", choices=END_SPREAD, help="compare with this curve, not the preset's")
    add("--against", metavar="RUNS", help="compare with two or more runs of the same length")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    sys.stdout = sys.stdout or open(os.devnull, "w")  # it was closed
    sys.stdout.reconfigure(errors="backslashreplace")  # for paths that its encoding lacks
    page = io.StringIO()
    try:
        options = parse_command_line(arguments)
        with contextlib.redirect_stdout(page):
            status = options.action(options)
    except (UserError, OSError, ImportError) as error:
        needed = os.path.relpath(HERE.parent / "requirements-dev.txt")
        hint = f"; pip install -r {shlex.quote(needed)}" if isinstance(error, ImportError) else ""
        print(f"{error}{hint}", file=sys.stderr)
        return 2
    try:
        print(page.getvalue(), end="", flush=True)
    except BrokenPipeError:  # the reader, say `head`, has left; the verdict stands
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # as on a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"cannot write the answer: {error.strerror}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
