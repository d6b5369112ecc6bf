"""Reads logs of runs and says what they are worth. A RUN is a run folder, a folder of such folders, a log file, a
pattern in quotes, or several of these joined by commas; logs of the public speedrun are read as well as our own.

    python records/report.py show RUN...                     # a table: steps, tokens, time, loss, machine, differences
    python records/report.py verify --target 3.28 RUN...     # is this a record? status 0: yes, 1: no
    python records/report.py compare A B                     # B against A, with 95 % intervals
    python records/report.py plot OUT.png RUN...             # losses, reference curves, history of the record
    python records/report.py band RUN                        # on the way its recipe goes? status 0: yes, 1: no

Bad input ends every command with one line and status 2. `--help` after a command lists its options.
"""

import argparse
import csv
import datetime
import glob
import hashlib
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from train_gpt2 import PRESETS, Config, Refusal, tokens_until

# ----------------------------------------------------------------------------------------------------------------------
# Logs. In: paths and patterns. Out: one Run for each log.


class Point(NamedTuple):
    """A loss, after so many updates. tokens: None where the log does not say how many an update takes."""

    step: int
    tokens: int | None
    seconds: float
    loss: float


@dataclass
class Run:
    """What a log holds. Fields that it does not state are empty."""

    path: Path  # of the log
    name: str
    script: str  # sha256 of the source, 12 digits
    changed: bool  # went on with another source later
    config: dict
    planned: int  # steps it set out for
    steps: int  # steps it has done
    seconds: float
    average: float  # milliseconds per step
    hardware: str
    torch: str
    val_targets: str  # from the notice of a short validation set
    shards: str  # names, sizes and checksums, as the log has them
    train: list[Point]
    val: list[Point]

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    @property
    def finished(self) -> bool:
        """Has done all its steps; where it validates, after the last one too."""
        return self.steps == self.planned and (not self.val or self.val[-1].step == self.planned)

    @property
    def points(self) -> list[Point]:
        """Validations, or training losses where there are none."""
        return self.val or self.train


STEP_LINE = re.compile(r"^step:(\d+)/(\d+)(?: (train|val)_loss:(\S+))? train_time:([\d.]+)ms step_avg:(\S+)ms",
                       re.MULTILINE)
RULE = re.compile(r"^={60,}$", re.MULTILINE)  # ends the source; public logs have a second one below the machine
TORCH = re.compile(r"\b(?:py)?torch (?:version )?(\d[^\s,]*)", re.IGNORECASE)
SMI_ROW = re.compile(r"^\|\s+\d+\s+(\S[^|]*?)\s+(?:On|Off)\s+\|", re.MULTILINE)  # a GPU in nvidia-smi's table
ELSEWHERE = ("seed", "out", "resume", "save_every", "keep", "patience")  # settings that leave training as it is


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def settings_in(text: str) -> list[dict]:
    """The configurations that a log of ours holds: one for each time it was started."""
    found = []
    for line in text.splitlines():
        if line.startswith('{"preset"'):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # cut off by a crash
                continue
    return found


def hardware_in(text: str) -> str:
    ours = re.search(r"^(CPU, .*|\d+ x \S.*)$", text, re.MULTILINE)
    if ours:
        return ours[0]
    cards = SMI_ROW.findall(text)
    return f"{len(cards)} x {cards[0]}" if cards else ""


def staged_tokens(config: dict, planned: int, given: tuple[int, ...]) -> Callable[[int], int | None]:
    """Tokens until a step, from a run's settings, or from the batch of its stages given on the command line."""
    batch = config.get("tokens_per_step") or given
    if not batch or not planned:
        return lambda step: None
    shape = replace(Config(), steps=planned, stages=config.get("stages", Config.stages),
                    extension=config.get("extension", Config.extension),
                    tokens_per_step=tuple(batch) if isinstance(batch, list | tuple) else (batch,))
    return lambda step: tokens_until(step, shape)


def read_log(path: Path, given_batch: tuple[int, ...] = ()) -> Run | None:
    """None where the file holds no step of a run. Raises Refusal for one that contradicts itself."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise Refusal(f"cannot read {path}: {error.strerror}; expected the log of a run, as logs/RUN/log.txt") from None
    start = RULE.match(text)  # logs of 2024 have a line of '=' above the source too
    text = text[start.end() + 1:] if start else text
    rule = RULE.search(text)
    source, text = (text[:rule.start()], text[rule.end():]) if rule else ("", text)
    if not STEP_LINE.search(text):
        return None
    configs = settings_in(text)
    config = configs[-1] if configs else {}
    # A run that went on after a stop may have logged steps beyond its checkpoint: those after that count.
    steps, losses = {}, {"train": {}, "val": {}}
    for piece in re.split(r"(?m)^(?=resumed after step \d+ )", text):
        back = re.match(r"resumed after step (\d+) ", piece)
        for kept in (steps, *losses.values()) if back else ():
            for step in [step for step in kept if step > int(back[1])]:
                del kept[step]
        for step, planned, kind, loss, milliseconds, average in STEP_LINE.findall(piece):
            steps[int(step)] = int(planned), float(milliseconds) / 1000, number(average)
            if kind:
                losses[kind][int(step)] = float(milliseconds) / 1000, number(loss)
    last = max(steps, default=0)
    planned, seconds, average = steps.get(last, (0, 0.0, math.nan))
    tokens = staged_tokens(config, planned, given_batch)
    points = {kind: {step: Point(step, tokens(step), *values) for step, values in found.items()}
              for kind, found in losses.items()}
    exact = path.with_name("metrics.jsonl")
    if path.name == "log.txt" and exact.exists():
        for line in exact.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                kind = "val" if "val_loss" in record else "train"
                point = Point(record["step"], record["tokens"], record["train_time_s"], float(record[f"{kind}_loss"]))
            except (json.JSONDecodeError, KeyError, TypeError, ValueError):  # cut off by a crash
                continue
            logged = points[kind].get(point.step, point)
            if abs(logged.loss - point.loss) > 2e-4:
                raise Refusal(f"{path.parent} has two {kind}_loss for step {point.step}, {logged.loss} in log.txt and "
                              f"{point.loss:.4f} in metrics.jsonl, expected the same; copy both files of the run again")
            points[kind][point.step] = point
            if point.step >= last:
                last, seconds = point.step, point.seconds
    if last and (math.isnan(average) or exact.exists()):
        average = 1000 * seconds / last
    ordered = [[points[kind][step] for step in sorted(points[kind])] for kind in ("train", "val")]
    notice = re.search(r"^notice: validating on all ([\d,]+) targets", text, re.MULTILINE)
    shards = re.search(r"^shards (\{.*)$", text, re.MULTILINE)
    torch, machine = TORCH.search(text), hardware_in(text)
    # Ours holds one line of '='; a second stands behind the source of a script that went on with the run.
    changed = bool(configs and RULE.search(text))
    digest = hashlib.sha256(source.removesuffix("\n").encode("utf-8", "replace")).hexdigest()[:12] if source else ""
    return Run(path, "", digest, changed, config, planned, last, seconds, average, machine, torch[1] if torch else "",
               notice[1] if notice else "", shards[1] if shards else "", *ordered)


def logs_below(folder: Path) -> list[Path]:
    if (folder / "log.txt").is_file():
        return [folder / "log.txt"]
    return sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".log") and path.is_file())


def read_runs(words: list[str], given_batch: tuple[int, ...] = ()) -> list[Run]:
    """Every run that the words name, once, by path. Raises Refusal for a word that names none."""
    found: dict[Path, Run] = {}
    for word in words:
        for part in [word] if Path(word).exists() else filter(None, word.split(",")):
            paths = [Path(part)] if Path(part).exists() else [Path(match) for match in sorted(glob.glob(part))]
            if not paths:
                raise Refusal(f"nothing is at {part}, expected a run folder, a log or a pattern of them; `ls logs` "
                              "lists the runs made here")
            logs = [log for path in paths for log in (logs_below(path) if path.is_dir() else [path])]
            runs = [run for run in (read_log(log, given_batch) for log in logs) if run]
            if not runs:
                raise Refusal(f"{part} holds no log of a run, expected lines as step:1/640 val_loss:5.5 "
                              "train_time:90ms step_avg:90ms; give the folder that train_gpt2.py named at its end")
            found.update({run.path.resolve(): run for run in runs})
    if not found:
        raise Refusal("no run is named, expected a run folder, a log or a pattern of them; `ls logs` lists the runs "
                      "made here")
    parts = {path: (path.parent if path.name == "log.txt" else path.with_suffix("")).parts for path in found}
    for path, run in found.items():  # the shortest end of the path that no other run has
        run.name = next("/".join(parts[path][-count:]) for count in range(1, len(parts[path]) + 1)
                        if sum(other[-count:] == parts[path][-count:] for other in parts.values()) == 1
                        or count == len(parts[path]))
    return list(found.values())


def differing_settings(runs: list[Run]) -> dict[str, list]:
    """Setting -> its value in each run that states its settings, where they are not all the same."""
    stated = [run.config for run in runs if run.config]
    names = dict.fromkeys(name for config in stated for name in config if name not in ELSEWHERE)
    columns = {name: [config.get(name, "not there") for config in stated] for name in names}
    for values in columns.values():  # a value for all stages was once written without its list
        values[:] = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in values]
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}


def table(rows: list[list[str]]) -> str:
    """Markdown that is even to read as plain text too; the first row is the head, numbers stand to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = [all(re.fullmatch(r"[+-]?[\d,.]+(/\d+| \(.*)?", row[column]) or not row[column] for row in rows[1:])
             for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(f"{cell:{'>' if flag else '<'}{width}}"
                               for cell, width, flag in zip(row, widths, right, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + (":" if flag else "-")
                                   for width, flag in zip(widths, right, strict=True)) + "|")
    return "\n".join(lines)


def show(options: argparse.Namespace) -> int:
    runs = read_runs(options.runs, options.tokens_per_step)
    rows = [["run", "seed", "steps", "tokens", "seconds", "ms/step", "final loss", "hardware", "torch", "script"]]
    for run in runs:
        last = run.points[-1] if run.points else Point(0, None, 0.0, math.nan)
        tokens = staged_tokens(run.config, run.planned, options.tokens_per_step)(run.steps) or last.tokens
        rows.append([run.name, "" if run.seed is None else str(run.seed),
                     f"{run.steps}" if run.finished else f"{run.steps}/{run.planned}", f"{tokens:,}" if tokens else "",
                     f"{run.seconds:.2f}", f"{run.average:.2f}",
                     f"{last.loss:.4f}" + ("" if run.finished and run.val else
                                           f" ({'val' if run.val else 'train'}, step {last.step})"),
                     run.hardware, run.torch, run.script + " and another" * run.changed])
    print(table(rows))
    different = differing_settings(runs)
    if different:
        alike: dict[str, list[Run]] = {}  # a column for each set of values
        for place, run in enumerate(run for run in runs if run.config):
            alike.setdefault(json.dumps([values[place] for values in different.values()]), []).append(run)
        heads = [group[0].name + f" and {len(group) - 1} more" * (len(group) > 1) for group in alike.values()]
        print("\nSettings that differ:\n")
        columns = [list(different), *map(json.loads, alike)]
        columns = [[json.dumps(value).strip('"') for value in column] for column in columns]
        print(table([["setting", *heads], *map(list, zip(*columns, strict=True))]))
    elif sum(bool(run.config) for run in runs) > 1:
        print("\nThe settings are the same in all runs that state them, but for the seed.")
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Tests. In: final losses. Out: probabilities, intervals, and what speaks against them.

# Spread of single runs' final losses. gpt2: what the rules of the public optimizer track set; records 41 to 89 show
# 0.0010 to 0.0015. five-minute: stated with record 12. tiny: our three hundred-second runs.
KNOWN_SPREAD = {"gpt2": 0.0013, "five-minute": 0.005, "tiny": 0.0094}


def distributions():
    try:
        from scipy import stats
    except ImportError:
        raise Refusal("scipy is not installed, expected for tests and intervals; pip install -r requirements-dev.txt"
                      ) from None
    return stats


class Verdict(NamedTuple):
    mean: float
    spread: float  # sample standard deviation; NaN for one run
    by_t: float  # probability of a mean this low or lower if the recipe only just reached the target
    by_known: float  # the same, with the spread taken as known


def judge(losses: list[float], target: float, known: float) -> Verdict:
    stats = distributions()
    count, mean = len(losses), statistics.fmean(losses)
    spread = statistics.stdev(losses) if count > 1 else math.nan
    distance = (mean - target) * count**0.5
    if count > 1 and spread:
        by_t = float(stats.t.cdf(distance / spread, count - 1))
    else:  # all runs alike, or one
        by_t = float(mean >= target) if count > 1 else math.nan
    return Verdict(mean, spread, by_t, float(stats.norm.cdf(distance / known)))


def runs_needed(margin: float, known: float, alpha: float) -> int:
    """The fewest runs whose mean, this far below the target, passes the test with the known spread."""
    return max(1, math.ceil((distributions().norm.isf(alpha) * known / margin) ** 2 - 1e-9))


def rule_breaks(runs: list[Run], planned: int | None) -> tuple[list[str], list[str]]:
    """(what makes the answer no, what could not be checked)."""
    against, unknown = [], []
    for run in runs:
        if not run.finished:
            against.append(f"{run.name} stopped early, at step {run.steps} of {run.planned}; its loss is left out")
    seeds = [run.seed for run in runs if run.seed is not None]
    repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if repeated:
        against.append(f"seed {', '.join(map(str, repeated))} repeats: runs of one seed are not independent")
    if len(seeds) < len(runs):
        unknown.append(f"{len(runs) - len(seeds)} of {len(runs)} logs state no seed, so that repeats would not show")
    curves = [tuple(point.loss for point in run.points if point.step) for run in runs]
    copies = [f"{runs[first].name} and {run.name}" for place, run in enumerate(runs)
              for first in [curves.index(curves[place])] if len(curves[place]) > 1 and first < place]
    if copies:
        against.append(f"{'; '.join(copies)} have the same losses throughout: one run counted twice")
    if planned is None:
        unknown.append("the number of runs fixed beforehand is not stated (--planned N): who looks after every run and "
                       "stops at the first p below 0.01 passes far too often")
    elif planned != len(runs):
        against.append(f"{planned} runs were planned and {len(runs)} are here: none may be left out or added")
    scripts = sorted({run.script for run in runs if run.script})
    if len(scripts) > 1 or any(run.changed for run in runs):
        against.append(f"the scripts differ: {', '.join(scripts)}" + ", and one changed during a run"
                       * any(run.changed for run in runs))
    if any(not run.script for run in runs):
        unknown.append("a log holds no source, so that the script is not known")
    different = differing_settings(runs)
    data = [name for name in ("train_files", "val_files", "val_tokens") if name in different]
    if len({run.shards for run in runs if run.shards}) > 1:
        data.append("shards of the same names with other tokens" if not data else "the shards themselves")
    if data or len({run.val_targets for run in runs if run.config}) > 1:
        against.append(f"the data differ: {', '.join(data) or 'validation sets of different length'}")
    others = [name for name in different if name not in data]
    if others:
        against.append(f"settings differ: {', '.join(others)}")
    lengths = sorted({run.planned for run in runs})
    if len(lengths) > 1 and "steps" not in others:
        against.append(f"the lengths differ: {', '.join(map(str, lengths))} steps")
    if len({run.hardware for run in runs}) > 1:
        unknown.append("the machines differ, so that the times do not make one mean")
    return against, unknown


def verify(options: argparse.Namespace) -> int:
    runs = read_runs(options.runs)
    silent = [run.name for run in runs if not run.val]
    if silent:
        raise Refusal(f"{silent[0]} has no val_loss, expected a validation after the last step; give whole runs")
    finished = [run for run in runs if run.finished]
    if not finished:
        raise Refusal(f"none of the {len(runs)} runs has ended, the first is at step {runs[0].steps} of "
                      f"{runs[0].planned}, expected whole runs; let them go on with --resume")
    losses = [run.val[-1].loss for run in finished]
    known = options.spread or KNOWN_SPREAD.get(finished[0].config.get("preset"), KNOWN_SPREAD["gpt2"])
    against, unknown = rule_breaks(runs, options.planned)
    if options.target == SPEEDRUN_TARGET:
        others = [run for run in runs if not on_fineweb(run)
                  or run.val_targets or run.config.get("val_tokens", VAL_TOKENS) != VAL_TOKENS]
        if others:
            against.append(f"the target {SPEEDRUN_TARGET:g} is for the first {VAL_TOKENS:,} validation tokens of "
                           f"FineWeb, {others[0].name} has others: name the --target of its data")
    diverged = [run.name for run in finished if not math.isfinite(run.val[-1].loss)]
    if diverged:
        print(f"no: {', '.join(diverged)} ended without a finite loss")
        return 1
    verdict, alpha = judge(losses, options.target, known), options.alpha
    margin = options.target - verdict.mean
    seconds = [run.seconds for run in finished]
    count = len(finished)
    print(f"runs     {count}, final losses {', '.join(f'{loss:.4f}' for loss in losses[:12])}"
          + f" and {count - 12} more" * (count > 12))
    print(f"mean     {verdict.mean:.5f}, {abs(margin):.5f} {'below' if margin > 0 else 'above'} the target "
          f"{options.target:g}")
    print(f"spread   {verdict.spread:.5f} in this sample, {known:g} taken as known" if count > 1 else
          f"spread   unknown from one run, {known:g} taken as known")
    print(f"p        {verdict.by_t:.2g} by the t-test, {verdict.by_known:.2g} with the known spread; asked: below "
          f"{alpha:g}, both one-sided")
    print(f"time     {statistics.fmean(seconds):.2f} s of training on average, {min(seconds):.2f} to "
          f"{max(seconds):.2f}")
    passes = verdict.by_t < alpha, verdict.by_known < alpha
    if passes[0] and not passes[1]:
        print(f"warning: the tests disagree: these {count} runs lie closer together than runs do (spread "
              f"{verdict.spread:.4f} against {known:g}), which a few do by chance, and only that passes the t-test")
    elif passes[1] and not passes[0] and count > 1:
        print(f"warning: the tests disagree: the t-test knows only these {count} runs, which spread by "
              f"{verdict.spread:.4f}, the test that passes takes {known:g} for granted; more runs decide")
    if count > 1 and distributions().chi2.sf((count - 1) * (verdict.spread / known) ** 2, count - 1) < 0.01:
        print(f"warning: a spread of {verdict.spread:.4f} is more than chance makes of {known:g}; take a larger "
              "--spread")
    for line in against + unknown:
        print(f"warning: {line}")
    reasons = [f"{len(against)} warning{'s are' if len(against) > 1 else ' is'} against the rules"] * bool(against)
    if margin <= 0:
        reasons.insert(0, "the mean is not below the target")
    elif not all(passes):
        needed = runs_needed(margin, known, alpha)
        reasons.insert(0, "one run shows no spread; make more, their number fixed beforehand" if count == 1 else
                       f"p is not below {alpha:g} by both tests" + (f"; at this margin {needed} runs would pass the "
                       "one with the known spread" if needed > count else ""))
    print(f"no: {'; '.join(reasons)}" if reasons else "yes: the mean is below the target by both tests"
          + ", as far as the warnings allow" * bool(unknown))
    return 1 if reasons else 0


# ----------------------------------------------------------------------------------------------------------------------
# Comparison. In: two sets of runs. Out: differences with 95 % intervals.


class Difference(NamedTuple):
    """B minus A. The interval is NaN where runs are too few."""

    mean: float
    low: float
    high: float

    def verdict(self) -> str:
        if math.isnan(self.low):
            return "one run: no interval"
        return "inside the noise" if self.low <= 0 <= self.high else "B is lower" if self.mean < 0 else "B is higher"


def difference(a: list[float], b: list[float], paired: bool) -> Difference:
    """paired: a and b are in the order of their partners. Otherwise Welch: each set has its own spread."""
    stats, middle = distributions(), statistics.fmean(b) - statistics.fmean(a)
    if min(len(a), len(b)) < 2:
        return Difference(middle, math.nan, math.nan)
    if paired:
        error, freedom = statistics.stdev([y - x for x, y in zip(a, b, strict=True)]) / len(a) ** 0.5, len(a) - 1
    else:
        parts = [statistics.variance(values) / len(values) for values in (a, b)]
        error = sum(parts) ** 0.5
        shares = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
        freedom = sum(parts) ** 2 / shares if shares else 1
    half = float(stats.t.ppf(0.975, freedom)) * error
    return Difference(middle, middle - half, middle + half)


def between(points: list[Point], place: float, key: Callable[[Point], float], value: Callable[[Point], float]) -> float:
    """The value at `place`, straight between two points, whose keys rise; NaN outside them."""
    for left, right in itertools.pairwise(points):
        if key(left) <= place <= key(right):
            share = (place - key(left)) / (key(right) - key(left)) if key(right) > key(left) else 1.0
            return value(left) + share * (value(right) - value(left))
    return value(points[0]) if len(points) == 1 and key(points[0]) == place else math.nan


def seconds_to(points: list[Point], loss: float) -> float:
    """When a run first reached this loss, straight between two validations; NaN: never."""
    for left, right in zip(points[:1] + points, points, strict=False):
        if right.loss <= loss:
            share = (left.loss - loss) / (left.loss - right.loss) if left.loss > right.loss else 1.0
            return left.seconds + min(1.0, max(0.0, share)) * (right.seconds - left.seconds)
    return math.nan


def marks(runs: list[Run], count: int = 6) -> tuple[str, Callable[[Point], int], list[int]]:
    """Where all runs can be compared: (the unit, how a point tells its place, the places)."""
    by_tokens = all(point.tokens is not None for run in runs for point in run.points)
    unit, key = ("tokens", lambda point: point.tokens) if by_tokens else ("steps", lambda point: point.step)
    common = sorted(set.intersection(*({key(point) for point in run.points} for run in runs)) - {0})
    if not common:
        common = [min(key(run.points[-1]) for run in runs)]
    chosen = sorted({common[round(place * (len(common) - 1) / max(1, count - 1))] for place in range(count)})
    return unit, key, chosen


def compare(options: argparse.Namespace) -> int:
    sets = [read_runs([word], options.tokens_per_step) for word in (options.a, options.b)]
    both = sets[0] + sets[1]
    for run in both:
        if not run.points or not all(math.isfinite(point.loss) for point in run.points):
            raise Refusal(f"{run.path} holds {'a loss that is not finite' if run.points else 'no loss'}, expected "
                          "whole runs; leave it out")
    if len({bool(run.val) for run in both}) > 1:
        without = next(run for run in both if not run.val)
        raise Refusal(f"{without.path} has no val_loss and others have, expected one kind of loss; leave it out")
    for a_or_b in sets:
        a_or_b.sort(key=lambda run: (run.seed is None, run.seed))
    seeds = [[run.seed for run in a_or_b] for a_or_b in sets]
    paired = seeds[0] == seeds[1] and None not in seeds[0] and len(set(seeds[0])) == len(seeds[0])
    for label, word, a_or_b in zip("AB", (options.a, options.b), sets, strict=True):
        print(f"{label}: {len(a_or_b)} run{'s' * (len(a_or_b) > 1)} of {word}, {a_or_b[0].planned} steps")
    print(f"paired by seed: {', '.join(map(str, seeds[0]))}" if paired else
          "not paired, since the seeds of A and B are not the same: Welch's interval")
    if not both[0].val:
        print("warning: no validations: training losses are compared, each of one batch only")
    lengths = {run.planned for run in both}
    if len(lengths) > 1:
        print("warning: the runs differ in length: at equal tokens their schedules are not equally far")
    if len({run.hardware for run in both}) > 1:
        print("warning: the machines differ: times of two machines, even of one kind, differ by more than most gains")
    if any(not run.finished for run in both):
        print("warning: stopped early: " + ", ".join(run.name for run in both if not run.finished))
    rows = [["", "A", "B", "B - A", "95 % interval", ""]]

    def add(what: str, digits: int, value: Callable[[Run], float]) -> None:
        a, b = ([value(run) for run in a_or_b] for a_or_b in sets)
        missing = [sum(map(math.isnan, values)) for values in (a, b)]
        if any(missing):
            rows.append([what, *(f"{len(values) - gone} of {len(values)}" for values, gone in zip((a, b), missing,
                                                                                                 strict=True)),
                         "", "", "not reached by all"])
            return
        found = difference(a, b, paired)
        interval = "" if math.isnan(found.low) else f"{found.low:+.{digits}f} to {found.high:+.{digits}f}"
        rows.append([what, f"{statistics.fmean(a):.{digits}f}", f"{statistics.fmean(b):.{digits}f}",
                     f"{found.mean:+.{digits}f}", interval, found.verdict()])

    unit, key, places = marks(both)
    for place in places:
        add(f"loss at {place:,} {unit}", 4, lambda run, place=place: between(run.points, place, key, lambda p: p.loss))
    loss = options.loss or max(run.points[-1].loss for run in both)
    add(f"seconds to a loss of {loss:.4f}", 3, lambda run: seconds_to(run.points, loss))
    add("milliseconds per step", 3, lambda run: run.average)
    print()
    print(table(rows))
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Reference curves and the band around them.

SPEEDRUN_TARGET, VAL_TOKENS = 3.28, Config.val_tokens
# The record whose recipe a preset is, or, of a larger model, the run that it follows.
REFERENCE = {"five-minute": 12, "gpt2": 62, "gpt2-medium": "gpt2-medium", "gpt2-xl": "gpt2-xl"}
# Spread of the final losses of several runs of a record. Record 62 has ranges of six runs at each validation instead.
# That of gpt2-xl is how far its run and a shorter one lie apart where both have the same rates.
END_SPREAD = {12: 0.005, 21: 0.0019, 40: 0.0011, 62: 0.0013, 89: 0.0015, "gpt2-medium": 0.0009, "gpt2-xl": 0.002}
RECORDS = [record for record in END_SPREAD if isinstance(record, int)]  # of the small model
RANGE_OF_SIX = 2.534  # how far apart the ends of six normal draws lie on average, in spreads
WIDTH = 4  # of the band to each side, in spreads
# How many times wider runs spread before a share of the run than at its end: as the public logs of records 14, 39 and
# 40 show for one batch size throughout, those of 61, 62 and 89 for a batch that grows by stage.
WIDER = {"constant": ((0.2, 6), (0.5, 3), (1.1, 1)), "staged": ((0.5, 12), (0.75, 4), (1.1, 2))}
OWN_RUNS = HERE / "2026-11-24_hundred-second_tiny_2-core_cpu"  # what `tiny` is compared with


def number_or_none(text: str, kind: type = float):
    return kind(text) if text else None


def reference_curves() -> dict[int | str, list[dict]]:
    """Record, or name of a larger model, -> its rows of curves.csv, as numbers; None where nothing is stated."""
    curves: dict[int | str, list[dict]] = {}
    with open(HERE / "curves.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            values = {name: number_or_none(text, int if name in ("step", "tokens") else float)
                      for name, text in row.items() if name != "record"}
            curves.setdefault(int(row["record"]) if row["record"].isdecimal() else row["record"], []).append(values)
    return curves


class Limits(NamedTuple):
    middle: float
    half: float


def record_band(record: int | str) -> dict[int, Limits]:
    """Step -> limits: from the range of six runs where it is known, else from the spread at the end and WIDER."""
    rows, band = reference_curves()[record], {}
    for row in rows:
        shape = WIDER["constant" if record in (12, 21, 40, "gpt2-xl") else "staged"]
        spread = END_SPREAD[record] * next(times for share, times in shape if row["step"] < share * rows[-1]["step"])
        middle = row["loss"]
        if row["lowest"] is not None:
            spread = max(END_SPREAD[record], (row["highest"] - row["lowest"]) / RANGE_OF_SIX)
            middle = (row["highest"] + row["lowest"]) / 2
        band[row["step"]] = Limits(middle, WIDTH * spread)
    return band


def runs_band(runs: list[Run]) -> dict[int, Limits]:
    """Step -> limits around the mean of two or more runs of one recipe. Few runs may lie close together by chance: no
    step gets less than the root mean square of all steps' spreads."""
    by_step = {point.step: [] for point in runs[0].val}
    for run in runs:
        for point in run.val:
            by_step.setdefault(point.step, []).append(point.loss)
    whole = {step: losses for step, losses in by_step.items() if len(losses) == len(runs)}
    variances = {step: statistics.variance(losses) for step, losses in whole.items()}
    least = statistics.fmean(variance for step, variance in variances.items() if step or len(variances) == 1)
    return {step: Limits(statistics.fmean(losses), WIDTH * (max(least, variances[step]) * (1 + 1 / len(runs))) ** 0.5)
            for step, losses in whole.items()}


# Settings that leave the losses at equal steps where they are, or that differ with the machine and the place of files.
OF_NO_MATTER = (*ELSEWHERE, "preset", "steps", "val_every", "train_files", "val_files", "micro_tokens", "device",
                "compile", "dtype", "head_dtype", "repeat")


def changed_settings(run: Run) -> list[str]:
    """Settings in which a run differs from its preset."""
    preset = {**{f.name: f.default for f in fields(Config)}, **PRESETS.get(run.config.get("preset"), {})}
    return [name for name, value in run.config.items() if name in preset and name not in OF_NO_MATTER
            and (tuple(value) if isinstance(value, list) else value) != preset[name]]


def band_of(run: Run, options: argparse.Namespace) -> tuple[str, dict[int, Limits], list[str]]:
    """(what the run is compared with, limits by step, settings that differ). Raises Refusal where nothing fits."""
    preset = run.config.get("preset")
    advice = "compare with runs of your own: --against FOLDER"
    if options.against or (preset == "tiny" and not options.record):
        others = read_runs([options.against or str(OWN_RUNS)])
        others = [other for other in others if other.path.resolve() != run.path.resolve() and other.val]
        if len(others) < 2:
            raise Refusal(f"{options.against or OWN_RUNS} has {len(others)} other run{'s' * (len(others) != 1)} with a "
                          "val_loss, expected 2 or more to know their spread; make more, each with its own --seed")
        like = others[0]
        same = all(other.planned == like.planned for other in others)
        if not options.against and (run.planned, run.val_targets) != (like.planned, like.val_targets):
            raise Refusal(f"preset tiny has no reference curve at {run.planned} steps on this data, only the runs in "
                          f"records/{OWN_RUNS.name} at {like.planned} steps on tiny Shakespeare; {advice}")
        if not same or run.planned != like.planned:
            raise Refusal(f"{run.name} has {run.planned} steps and {like.name} {like.planned}, expected one length, "
                          "with which schedules stretch; compare runs of the same --steps")
        what = (f"{len(others)} runs of {options.against or f'records/{OWN_RUNS.name}'}, {WIDTH} of their spreads to "
                "each side")
        changed = [name for name in differing_settings([run, *others]) if name not in OF_NO_MATTER]
        return what, runs_band(others), changed
    record = options.record or REFERENCE.get(preset)
    if record is None:
        raise Refusal(f"{run.name} does not state its preset, expected to know what to compare it with; name a record: "
                      f"--record {'|'.join(map(str, RECORDS))}")
    width = "the spread of six runs of it at each step" if record == 62 else (
        f"the spread of its runs: {END_SPREAD[record]:g} at the end, more before, as in runs like it")
    curve, name = reference_curves()[record], f"record {record}" if record in RECORDS else f"the run of {record}"
    if run.planned != curve[-1]["step"]:
        raise Refusal(f"{run.name} has {run.planned} steps and {name} {curve[-1]['step']}: schedules stretch "
                      f"with the length, so that losses at equal steps do not compare; {advice}")
    return f"{name}, {WIDTH} times {width}, to each side", record_band(record), changed_settings(run)


def band(options: argparse.Namespace) -> int:
    runs = read_runs([options.run])
    if len(runs) > 1:
        raise Refusal(f"{options.run} holds {len(runs)} runs, expected one; the first is {runs[0].path}")
    run, = runs
    if options.record and options.record not in RECORDS:
        raise Refusal(f"--record {options.record} has no curve here, expected one of "
                      f"{', '.join(map(str, RECORDS))}")
    what, limits, changed = band_of(run, options)
    if changed:
        print(f"warning: not the same settings: {', '.join(changed)}")
    if not options.against and what.startswith(("record ", "the run of ")) and not on_fineweb(run):
        print(f"warning: trained on {run.config['train_files']}, the reference on FineWeb")
    both = [point for point in run.val if point.step in limits]
    if not both:
        raise Refusal(f"{run.name} has no val_loss at a step of the reference ({', '.join(map(str, limits))}), "
                      "expected one at least; let it run on, or choose --val-every so that steps meet")
    rows, outside = [["step", "val_loss", "band", ""]], 0
    for point in both:
        middle, half = limits[point.step]
        inside = abs(point.loss - middle) <= half  # false for NaN
        outside += not inside
        rows.append([str(point.step), f"{point.loss:.4f}", f"{middle - half:.4f} to {middle + half:.4f}",
                     "inside" if inside else f"{'below' if point.loss < middle else 'above'} it"])
    print(f"{run.name} against {what}\n")
    print(table(rows))
    print(f"\n{'yes' if not outside else 'no'}: {len(both) - outside} of {len(both)} validations are inside the band"
          + ("" if run.finished else f", so far as step {run.steps} of {run.planned}"))
    return 1 if outside else 0


# ----------------------------------------------------------------------------------------------------------------------
# Picture.

INK, REFERENCE_INK = "#222222", "#9a9a9a"
COLOURS = ("#1f6fb4", "#c8553d", "#3a8f4d", "#7d55a8", "#b8860b", "#198a91", "#a8437f", "#5c6b2f")
LINE_STYLES = {12: (0, (1, 1.2)), 21: (0, (4, 1.5)), 40: (0, (6, 1.5, 1, 1.5)), 62: "-", 89: (0, (9, 2))}
NAMED = {"12": (6, 8), "15": (8, 6), "21": (-2, 12), "29": (8, 8), "40": (8, 8), "53": (8, 6), "62": (8, 8),
         "81": (8, 10), "89": (-14, 12)}  # records with a label in the history, and where it stands, in points


def on_fineweb(run: Run) -> bool:
    """Public logs are; ours say which files they read."""
    return not run.config or "fineweb" in str(run.config.get("train_files", "")).lower()


def short(text: str, length: int = 44) -> str:
    return text if len(text) <= length else f"{text[:length // 2 - 1]}…{text[-(length - length // 2):]}"


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs that differ in the seed only, under one label."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {name: value for name, value in run.config.items() if name not in ELSEWHERE}
        key = json.dumps([run.script, settings, run.planned], sort_keys=True) if run.script else str(run.path)
        groups.setdefault(key, []).append(run)
    labels: dict[str, list[Run]] = {}
    plain = [short(f"{group[0].config.get('preset') or group[0].path.parent.name}, {group[0].planned} steps, "
                   f"{len(group)} runs" if len(group) > 1 else group[0].name) for group in groups.values()]
    folders = [group[0].path.parent.parent.name for group in groups.values()]
    for label, folder, group in zip(plain, folders, groups.values(), strict=True):
        if plain.count(label) > 1:
            label += f", {short(folder if folders.count(folder) == 1 else group[0].name)}"
        number = 1 + sum(known.startswith(label) for known in labels)
        labels[label + f" ({number})" * (number > 1)] = group
    if len(labels) > 3 * len(COLOURS):
        raise Refusal(f"{len(labels)} kinds of runs, expected at most {3 * len(COLOURS)} to tell their lines apart; "
                      "draw fewer at once")
    return labels


def clean(panel, title: str, across: str, up: str) -> None:
    panel.set_title(title, color=INK, fontsize=11, loc="left")
    panel.set_xlabel(across, color=INK, fontsize=9.5)
    panel.set_ylabel(up, color=INK, fontsize=9.5)
    panel.set_facecolor("white")
    panel.grid(which="major", color="#e2e2e2", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(which="both", colors=INK, labelsize=9)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def plain_ticks(axis, unit: float = 1.0) -> None:
    """Numbers as they are said, not powers of ten, on an axis with a log scale."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,), numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_losses(panel, groups: dict[str, list[Run]], references: bool, across: str) -> int:
    """Lines of all runs that can be placed; `across` is seconds or tokens. Returns how many runs were left out."""
    left_out = 0
    for record, rows in reference_curves().items() if references else ():
        if record not in RECORDS:
            continue
        end = rows[-1]
        spots = [(row["tokens"] if across == "tokens" else row["seconds"] if row["seconds"] is not None
                  else end["seconds"] * row["step"] / end["step"], row["loss"]) for row in rows if row["step"]]
        spots = [spot for spot in spots if spot[0] is not None]
        if len(spots) > 1:
            panel.plot(*zip(*spots, strict=True), color=REFERENCE_INK, linestyle=LINE_STYLES[record], linewidth=1.3,
                       label=f"record {record}, {end['seconds']:.0f} s on 8 H100", zorder=2)
    looks = [(colour, style) for style in ("-", "--", ":") for colour in COLOURS]
    for (colour, style), (label, runs) in zip(looks, groups.items(), strict=False):
        for run in runs:
            spots = [(point.tokens if across == "tokens" else point.seconds, point.loss) for point in run.points
                     if point.step and math.isfinite(point.loss)]
            if not spots or any(spot[0] is None for spot in spots):
                left_out += 1
                continue
            panel.plot(*zip(*spots, strict=True), color=colour, linestyle=style, linewidth=1.6, alpha=0.85, zorder=3,
                       label=label, marker="o" if len(spots) < 25 else None, markersize=3)
            label = None  # once in the legend
    if references:
        panel.axhline(3.28, color=INK, linewidth=0.8, linestyle="--", zorder=1)
    panel.set_xscale("log")
    panel.autoscale_view()
    plain_ticks(panel.xaxis, 1e6 if across == "tokens" else 1)
    return left_out


def draw_history(panel) -> None:
    with open(HERE / "history.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    days = [datetime.date.fromisoformat(row["date"]) for row in rows]
    seconds = [float(row["seconds"]) for row in rows]
    panel.step(days, seconds, where="post", color=COLOURS[0], linewidth=1.3)
    panel.scatter(days, seconds, color=COLOURS[0], s=11, zorder=3)
    panel.set_yscale("log")
    for row, day, value in zip(rows, days, seconds, strict=True):
        if row["record"] in NAMED:
            panel.annotate(f"#{row['record']} {value:g} s", (day, value), NAMED[row["record"]], fontsize=9, color=INK,
                           textcoords="offset points", arrowprops={"arrowstyle": "-", "color": "#888888", "lw": 0.6})
    panel.set_yticks([70, 100, 150, 200, 300], ["70", "100", "150", "200", "300"])
    panel.minorticks_off()
    panel.set_ylim(64, 370)
    panel.set_xlim(days[0] - datetime.timedelta(20), days[-1] + datetime.timedelta(40))
    clean(panel, f"the record, #{rows[0]['record']} to #{rows[-1]['record']}, 8 H100 to a loss of 3.28", "",
          "seconds of training (log scale)")


def plot(options: argparse.Namespace) -> int:
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise Refusal("matplotlib is not installed, expected to draw; pip install -r requirements-dev.txt") from None

    if options.out.suffix.lower() != ".png":
        raise Refusal(f"{options.out} does not end in .png, expected the name of the picture before the runs; for "
                      "example logs/runs.png")
    runs = read_runs(options.runs, options.tokens_per_step) if options.runs else []
    lossless = [run.name for run in runs if not [point for point in run.points if point.step]]
    if lossless:
        raise Refusal(f"{lossless[0]} has no loss after step 0, expected one at least; leave it out or let it go on")
    references = options.references == "yes" or (options.references == "auto" and all(map(on_fineweb, runs)))
    groups = grouped(runs)
    figure = plt.figure(figsize=(11, 8.6), facecolor="white", layout="constrained")
    panels = figure.subplot_mosaic([["time", "tokens"], ["history", "history"]])
    kind = "validation" if all(run.val for run in runs) else "validation, or else training"
    for name, title, unit in (("time", "loss over time", "seconds of training (log scale)"),
                              ("tokens", "loss over tokens", "millions of training tokens (log scale)")):
        gone = draw_losses(panels[name], groups, references, "seconds" if name == "time" else "tokens")
        title += f" ({gone} run{'s' * (gone > 1)} without token counts left out)" * bool(gone and name == "tokens")
        clean(panels[name], title, unit, f"{kind} loss, nats per token")
    draw_history(panels["history"])
    found = {label: line for panel in (panels["tokens"], panels["time"])
             for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    order = sorted(found, key=lambda label: (not label.startswith("record "), label))
    figure.legend([found[label] for label in order], order, loc="outside upper center", frameon=False, fontsize=9,
                  ncols=min(3, max(1, len(order))), labelcolor=INK)
    if references:
        figure.supxlabel("grey: logs of the public speedrun's records; times within #12, #21 and #40 are taken as even "
                         "over their steps, the tokens of #89 are not known. dashed: 3.28", fontsize=8.5, color=INK)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.out, dpi=110, facecolor="white")
    except OSError as error:
        raise Refusal(f"cannot write {options.out}: {error.strerror}; name a writable place") from None
    finally:
        plt.close(figure)
    print(f"wrote {options.out}: {len(runs)} run{'s' * (len(runs) != 1)} in {len(groups)} group"
          f"{'s' * (len(groups) != 1)}, " + ("with" if references else "without") + " reference curves"
          + (" (other data than FineWeb; --references yes draws them)"
                               if not references and options.references == "auto" else ""))
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Command line.


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Refusal(f"{message}; {self.prog} --help lists what it takes")


def above_zero(text: str) -> float:
    value = number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def probability(text: str) -> float:
    if not above_zero(text) < 0.5:
        raise argparse.ArgumentTypeError(f"{text} is not a probability below 0.5")
    return float(text)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def batches(text: str) -> tuple[int, ...]:
    values = tuple(count(part) for part in text.split(","))
    if len(values) > 4:
        raise argparse.ArgumentTypeError(f"{text} is more than 4 stages")
    return values


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python records/report.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="show|verify|compare|plot|band", required=True)

    def command(action: Callable, text: str) -> argparse.ArgumentParser:
        part = commands.add_parser(action.__name__, help=text, description=text.replace("%%", "%"), allow_abbrev=False)
        part.set_defaults(action=action, tokens_per_step=())
        return part

    def takes_batches(part: argparse.ArgumentParser) -> None:
        part.add_argument("--tokens-per-step", type=batches, default=(), metavar="N[,N...]",
                          help="for logs that do not state it: tokens of one update, by stage as in gpt2")

    part = command(show, "a table of runs, and the settings in which they differ")
    part.add_argument("runs", nargs="+", metavar="RUN")
    takes_batches(part)
    part = command(verify, "is the mean of the final losses below the target? status 0: yes, 1: no, 2: bad input")
    part.add_argument("runs", nargs="+", metavar="RUN")
    part.add_argument("--target", type=above_zero, default=SPEEDRUN_TARGET, metavar="LOSS", help="default: 3.28")
    part.add_argument("--planned", type=count, metavar="N", help="number of runs that was fixed before the first one")
    part.add_argument("--spread", type=above_zero, metavar="S", help="known spread of final losses of single runs "
                      f"(default: {', '.join(f'{name} {value:g}' for name, value in KNOWN_SPREAD.items())}, others "
                      f"{KNOWN_SPREAD['gpt2']:g})")
    part.add_argument("--alpha", type=probability, default=0.01, metavar="P", help="both tests must lie below "
                      "(default: 0.01)")
    part = command(compare, "differences of B to A with 95 %% intervals, by seed where both have the same seeds")
    part.add_argument("a", metavar="A", help="a folder of runs, a pattern, or runs joined by commas")
    part.add_argument("b", metavar="B", help="the same")
    part.add_argument("--loss", type=above_zero, metavar="LOSS", help="for the time to a loss (default: the highest "
                      "final loss, which all reach)")
    takes_batches(part)
    part = command(plot, "one PNG: loss over time and over tokens, reference curves, history of the record")
    part.add_argument("out", type=Path, metavar="OUT.png")
    part.add_argument("runs", nargs="*", metavar="RUN")
    part.add_argument("--references", choices=("auto", "yes", "no"), default="auto", help="curves of the public "
                      "records; auto: where all runs were trained on FineWeb (default)")
    takes_batches(part)
    part = command(band, "is a run, finished or not, where runs of its recipe are? status 0: yes, 1: no, 2: bad input")
    part.add_argument("run", metavar="RUN")
    part.add_argument("--record", type=count, metavar="N", help="compare with this record's curve, not the preset's: "
                      + ", ".join(map(str, END_SPREAD)))
    part.add_argument("--against", metavar="RUNS", help="compare with these runs, two or more of one length")
    options, more = parser.parse_known_args(arguments)  # argparse takes no RUN that stands behind an option
    if more and (not hasattr(options, "runs") or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized: {' '.join(more)}")
    if more:
        options.runs = [*options.runs, *more]
    return options


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(arguments)
        return options.action(options)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
