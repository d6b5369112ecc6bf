"""Which of two versions is faster? Runs them in turn on one machine and compares their time per step.

    python records/bench.py HEAD~1 HEAD                        # two commits of the repository in which you stand
    python records/bench.py main . --rounds 10 --json ab.json  # a branch against the files as they are now
    python records/bench.py 'python old.py' 'python new.py'    # two commands

A and B are commits (hash, branch, tag), `.` or WORKING for the working tree, or commands: words with a space, or a
program. A commit is checked out in a temporary folder, which goes when all is done, and runs --command there; data
folders that git does not know are linked into it. `python` is the one that runs this file.

Order. The rounds go A B, B A, A B, ...: a machine that gets slower all the time adds to B - A in one round what it
takes from it in the next, so an even number of rounds cancels a steady drift, which A B, A B, ... would count for A.
Of an odd number, one round's drift divided by the rounds is left, always less than the interval is wide. The interval
is that of the mean of the rounds' differences, 95 % by t.

Measure. Milliseconds per step from the train_time in the log lines that a run prints, over its steps after the first
--skip; the lines of the public speedrun are read too. Validation is outside that clock. Where not all runs have such
lines, the last step_avg is compared, else the time of the whole command. The table says which.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import doctor
from ladder import processor
from report import STEP_LINE, Parser, count, difference, distributions, number, table

from train_gpt2 import Refusal, nearest

GRACE = 30  # seconds to end in; torchrun needs some to end its processes
WORKING = (".", "WORKING")
FILES = re.compile(r"--(train|val)[-_]files")
BY_CLOCK, BY_AVERAGE, WHOLE = MEASURES = (
    "ms per step by train_time", "ms per step by the last step_avg", "ms of the whole command")
STATE = ("--query-gpu=index,name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,"
         "temperature.gpu,clocks_event_reasons.active")

# ----------------------------------------------------------------------------------------------------------------------
# What is compared. In: two words. Out: a command and a folder for each.


class Side(NamedTuple):
    label: str  # A or B
    what: str
    words: list[str]
    folder: Path
    out: Path  # where its runs go


def git(folder: Path, *arguments) -> str:
    """What git prints; Ctrl-C does not reach it. Raises Refusal with what a failing one says."""
    try:
        ended = subprocess.run(["git", *map(str, arguments)], check=False, cwd=folder, capture_output=True, text=True,
                               start_new_session=True)
    except FileNotFoundError:
        raise Refusal("git is not installed, expected to find commits; install it, or give two commands") from None
    if ended.returncode:
        raise Refusal(f"git {arguments[0]} says: {ended.stderr.strip() or 'nothing'}")
    return ended.stdout.strip()


def take_away(root: Path, folder: Path) -> None:
    """Git forgets a folder that it has checked out, or half of it."""
    try:
        git(root, "worktree", "remove", "--force", "--force", folder)
    except Refusal:
        shutil.rmtree(folder, ignore_errors=True)
        git(root, "worktree", "prune")


def check_out(root: Path, commit: str, folder: Path, stack: contextlib.ExitStack) -> None:
    """The commit in a folder of its own, till the stack is left. What git does not know below data/ is linked there."""
    stack.callback(take_away, root, folder)
    git(root, "worktree", "add", "--detach", folder, commit)
    for name in git(root, "ls-files", "--others", "--directory", "-z", "--", "data").split("\0"):
        link = folder / name
        if name and "__pycache__" not in name and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(root / name)


def default_command(gpus: int) -> str:
    if gpus:
        return f"torchrun --standalone --nproc_per_node={gpus} train_gpt2.py --steps 200 --val-every 0"
    return "python train_gpt2.py --preset tiny --steps 60 --val-every 0"


def split(command: str) -> list[str]:
    with contextlib.suppress(ValueError):
        if words := shlex.split(command):
            return words
    raise Refusal(f"{command!r} is no command, expected words as a shell takes them, with their quotes closed")


def for_commit(command: str, out: Path) -> list[str]:
    """The command of a commit. Relative files are meant from where the user stands, as for run.sh."""
    words: list[str] = []
    for word in split(command):
        option, equals, value = word.partition("=")
        if words and FILES.fullmatch(words[-1]):
            word = str(Path.cwd() / word)
        elif equals and FILES.fullmatch(option):
            word = f"{option}={Path.cwd() / value}"
        words.append(word)
    is_ours = any(Path(word).name in ("train_gpt2.py", "run.sh") for word in words)
    given = any(word.partition("=")[0] == "--out" for word in words)
    return words + ["--out", str(out)] * (is_ours and not given)


def side(label: str, word: str, command: str, temporary: Path, stack: contextlib.ExitStack) -> Side:
    """What a word means. Raises Refusal for one that means nothing."""
    here, out, root, commit = Path.cwd(), temporary / f"runs of {label}", None, ""
    is_command = len(word.split()) > 1 or word not in WORKING and shutil.which(word)
    try:
        if len(word.split()) < 2:
            root = Path(git(here, "rev-parse", "--show-toplevel"))
            commit = git(root, "rev-parse", "--verify", f"{'HEAD' if word in WORKING else word}^{{commit}}")
    except Refusal as refusal:
        if not is_command:
            names = git(root, "for-each-ref", "--format=%(refname:short)").split() if root else []
            advice = f"the nearest is {nearest(word, ['HEAD', *names])}" if root else "cd to the repository"
            reason = f"is no commit of {root}" if root else f"cannot be looked up: {refusal}"
            raise Refusal(f"{label}, {word!r}, {reason}; expected a commit, . for the working tree, or a command; "
                          f"{advice} (git log --oneline lists commits)") from None
    if not commit:
        return Side(label, word, split(word), here, out)
    what = git(root, "log", "-1", "--format=%h %s", commit)
    changed = len(git(root, "status", "--porcelain", "--untracked-files=no").splitlines())
    if word in WORKING:
        what = f"the working tree, {changed} file(s) changed since {what}"
        return Side(label, what, for_commit(command, out), root, out)
    if changed and commit == git(root, "rev-parse", "HEAD"):
        what += f" (without the changes to {changed} file(s) since; . takes them)"
    check_out(root, commit, temporary / label, stack)
    return Side(label, what, for_commit(command, out), temporary / label, out)


# ----------------------------------------------------------------------------------------------------------------------
# One run. In: a side. Out: its time per step and its loss.


class Measured(NamedTuple):
    times: dict[str, float]  # milliseconds, by those of MEASURES that it has
    steps: int
    loss: float  # the last one: of validation, or of training where there is none; NaN without any


def read_output(text: str, seconds: float, skip: int) -> Measured:
    """What a run printed, and how long all of it took. Raises Refusal where no step is left to measure."""
    clock: list[tuple[int, float]] = []
    losses, average = {}, math.nan
    for step, _, kind, loss, milliseconds, step_avg in STEP_LINE.findall(text):
        if clock and float(milliseconds) < clock[-1][1]:  # set back, as older public scripts do after their warm-up
            clock.clear()
        clock.append((int(step), float(milliseconds)))
        losses[kind], average = number(loss), number(step_avg)
    steps = clock[-1][0] if clock else 0
    if clock and skip >= steps:
        raise Refusal(f"--skip {skip} leaves none of {steps} steps; the nearest is --skip {max(0, steps - 1)}")
    kept = [moment for moment in clock if moment[0] >= skip]
    times = {BY_CLOCK: math.nan, BY_AVERAGE: average, WHOLE: 1000 * seconds}
    if kept and kept[-1][0] > kept[0][0]:
        times[BY_CLOCK] = (kept[-1][1] - kept[0][1]) / (kept[-1][0] - kept[0][0])
    return Measured({name: value for name, value in times.items() if math.isfinite(value)}, steps,
                    losses.get("val", losses.get("train", math.nan)))


def last_words(stderr: str, stdout: str) -> str:
    """The last line, but for what torchrun says about the end of its processes."""
    own = re.split(r"^E\d{4} .*/elastic/", stderr, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in (stdout + "\n" + own).splitlines() if line.strip() and not re.match(r"W\d{4} ", line)]
    return lines[-1].strip() if lines else "nothing"


def end(process: subprocess.Popen) -> None:
    """End it and all that it has started."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            if process.poll() is None:
                os.killpg(process.pid, sent)
                process.wait(GRACE)


def run_once(side: Side, name: str, temporary: Path, options: argparse.Namespace) -> Measured:
    """Raises Refusal for a run that fails or takes too long."""
    path = os.pathsep.join([str(temporary), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment, late = {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix}, threading.Event()
    with (tempfile.TemporaryFile("w+", errors="replace") as stdout,
          tempfile.TemporaryFile("w+", errors="replace") as stderr):
        begin = time.perf_counter()
        try:
            process = subprocess.Popen(side.words, cwd=side.folder, env=environment, stdin=subprocess.DEVNULL,
                                       stdout=stdout, stderr=stderr, start_new_session=True)
        except OSError as error:
            raise Refusal(f"{name}: cannot start {side.words[0]}: {error.strerror}; expected a program") from None
        # A wait with a limit would look only now and then whether the command has ended.
        timer = threading.Timer(options.timeout, lambda: (late.set(), end(process)))
        try:
            timer.start()
            status = process.wait()
        finally:
            timer.cancel()
            end(process)
        seconds = time.perf_counter() - begin
        stdout.seek(0), stderr.seek(0)
        printed, said = stdout.read(), stderr.read()
    for model in side.out.rglob("model.pt"):  # a run leaves up to a GiB, and only its time is asked for
        model.unlink()
    if late.is_set():
        raise Refusal(f"{name} was still running after {options.timeout:g} s, so it was ended; expected less: give "
                      "fewer steps, or a longer --timeout")
    if status:
        raise Refusal(f"{name} ({side.what}) ended with status {status if status > 0 else 128 - status}, expected 0; "
                      f"it said: {last_words(said, printed)}; its command: {shlex.join(side.words)}")
    return read_output(printed, seconds, options.skip)


# ----------------------------------------------------------------------------------------------------------------------
# The machine.


def asked(question, *arguments):
    """The answer of nvidia-smi; empty where it is not installed, its complaint where it fails."""
    try:
        return question(*arguments) or ""
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi gives no answer: {' '.join(str(error).split())}"


def gpu_state() -> list[str]:
    """A line for each GPU."""
    rows = asked(doctor.table, STATE)
    if isinstance(rows, str):
        return [rows] * bool(rows)
    lines = []
    for index, name, driver, sm, most_sm, memory, most_memory, power, heat, bits in rows:
        bits = doctor.number(bits)  # NaN where the GPU does not say
        held = [problem.split(":")[0] for mask, problem in doctor.REASONS.items() if bits > 0 and int(bits) & mask]
        lines.append(f"GPU {index}: {name}, driver {driver}, SM {sm} of {most_sm} MHz, memory {memory} of {most_memory}"
                     f" MHz, power limit {power} W, {heat} degrees, {', '.join(held) or 'not throttled'}")
    return lines


def machine() -> list[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f"load {os.getloadavg()[0]:.2f} before, " if hasattr(os, "getloadavg") else ""
    topology = re.sub(r"\x1b\[\d*m", "", asked(doctor.run, "nvidia-smi topo -m")).splitlines()
    first = (f"machine: {processor()}, {cores} of {os.cpu_count()} cores, {load}Python {sys.version.split()[0]}, torch "
             f"{torch.__version__}")
    return [first, *gpu_state(), *(line.rstrip() for line in topology if line.strip())]


# ----------------------------------------------------------------------------------------------------------------------
# Command line.


def seconds(text: str) -> float:
    if not 0 <= number(text) <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 0 to a million")
    return float(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python records/bench.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A", help="commit, . or command")
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument("--command", metavar="WORDS", help="what a commit runs, in one pair of quotes (default: tiny "
                        "on a CPU, 200 steps of gpt2 on all GPUs)")
    parser.add_argument("--rounds", type=count, default=6, metavar="N", help="runs of each, 2 or more (default: 6)")
    parser.add_argument("--skip", type=int, default=10, metavar="N", help="first steps that do not count (default: 10)")
    parser.add_argument("--cool", type=seconds, default=0.0, metavar="S", help="seconds of pause before each "
                        "run but the first (default: 0)")
    parser.add_argument("--timeout", type=seconds, default=86_400.0, metavar="S", help="most seconds that a run may "
                        "take (default: a day)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there as well")
    options = parser.parse_args(arguments)
    options.command = options.command or default_command(torch.cuda.device_count())
    if options.rounds < 2:
        raise Refusal("--rounds 1 gives no interval, expected 2 or more; for example --rounds 6")
    if options.skip < 0:
        raise Refusal(f"--skip {options.skip} is below 0, expected a number of steps; for example --skip 10")
    if options.json and (options.json.is_dir() or not os.access(options.json.absolute().parent, os.W_OK)):
        raise Refusal(f"cannot write {options.json}, expected a file in a writable folder; name another with --json")
    return options


def measure(sides: list[Side], temporary: Path, options: argparse.Namespace) -> dict[str, list[Measured]]:
    """All runs, by label. Which side goes first changes with the round."""
    runs: dict[str, list[Measured]] = {"A": [], "B": []}
    for turn in range(options.rounds):
        for one in sides if turn % 2 == 0 else sides[::-1]:
            if any(runs.values()):
                time.sleep(options.cool)
            name = f"{one.label} in round {turn + 1}"
            found = run_once(one, name, temporary, options)
            runs[one.label].append(found)
            shown = next(iter(found.times))
            print(f"{name}: {found.times[shown]:.3f} {shown}; {found.steps} steps, last loss {found.loss:.4f}, "
                  f"{found.times[WHOLE] / 1000:.1f} s in all", flush=True)
    return runs


def conclude(runs: dict[str, list[Measured]]) -> dict:
    """Prints the table and the verdict. Returns the numbers."""
    every = runs["A"] + runs["B"]
    measure = next(name for name in MEASURES if all(name in run.times for run in every))
    a, b = ([run.times[measure] for run in runs[label]] for label in "AB")
    losses = [[run.loss for run in runs[label]] for label in "AB"]
    rows = [["round", "first", "A", "B", "B - A", "loss of A", "loss of B"]]
    for turn, (one, other, *both) in enumerate(zip(a, b, *losses, strict=True)):
        rows.append([str(turn + 1), "AB"[turn % 2], f"{one:.3f}", f"{other:.3f}", f"{other - one:+.3f}",
                     *(f"{loss:.4f}" for loss in both)])
    print(f"\nCompared: {measure}.\n\n{table(rows)}\n")
    if len({run.steps for run in every}) > 1:
        texts = (", ".join(map(str, sorted({run.steps for run in runs[label]}))) for label in "AB")
        print("warning: not the same number of steps: A has {}, B {}".format(*texts))
    found, share = difference(a, b, paired=True), 100 / statistics.fmean(a)
    print(f"B - A: {found.mean:+.3f} ms, 95 % interval {found.low:+.3f} to {found.high:+.3f} ms; in % of A "
          f"{share * found.mean:+.2f}, {share * found.low:+.2f} to {share * found.high:+.2f}")
    result = {"measure": measure, "difference_ms": found._asdict(), "difference_percent": share * found.mean}
    verdict = f"{'B' if found.mean < 0 else 'A'} is faster by {abs(found.mean):.3f} ms, {abs(share * found.mean):.2f} %"
    if found.low <= 0 <= found.high:
        verdict = "inside the noise"
    if all(math.isfinite(run.loss) for run in every):
        loss = difference(*losses, paired=True)
        result["difference_loss"] = loss._asdict()
        print(f"last loss, B - A: {loss.mean:+.4f}, 95 % interval {loss.low:+.4f} to {loss.high:+.4f}; what it is "
              "worth over seeds tells records/report.py compare")
        if loss.low > 0 or loss.high < 0:
            verdict += f"; {'B' if loss.mean > 0 else 'A'} has the higher loss, by {abs(loss.mean):.4f}"
    elif any(run.steps for run in every):
        verdict += "; not every run has a loss that is finite"
    print(f"verdict: {verdict}")
    return {**result, "verdict": verdict}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    distributions()  # which may be missing
    try:
        with contextlib.ExitStack() as stack:
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            for name in ("python", "python3"):
                (temporary / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
                (temporary / name).chmod(0o755)
            sides = [side(label, word, options.command, temporary, stack)
                     for label, word in zip("AB", (options.a, options.b), strict=True)]
            for one in sides:
                print(f"{one.label}: {one.what}")
            if any(one.what != shlex.join(one.words) for one in sides):
                print(f"command: {options.command}")
            before = machine()
            print("\n".join(before), flush=True)
            runs = measure(sides, temporary, options)
            after = gpu_state()
            print("".join(f"after: {line}\n" for line in after), end="")
    except KeyboardInterrupt:
        print("interrupted; what was checked out is gone again", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise Refusal("nobody reads what is found any more, as behind `| head`; let it print all") from None
    result = conclude(runs)
    if options.json:
        listed = {label: [{**run._asdict(), "loss": run.loss if math.isfinite(run.loss) else None} for run in some]
                  for label, some in runs.items()}
        record = {"A": sides[0].what, "B": sides[1].what, "command": options.command, "skip": options.skip,
                  "machine": before, "after": after, "runs": listed, **result}
        try:
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise Refusal(f"cannot write {options.json}: {error.strerror}; name another file with --json") from None


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):  # so that what was checked out goes then too
        signal.signal(ending, lambda sent, _frame: sys.exit(128 + sent))
    main()
