"""Which of two is faster, and do both reach the same loss? Runs them in turn on one machine: A B, B A, A B, ...

    python records/bench.py HEAD~1 HEAD                        # two commits of the repository in which you stand
    python records/bench.py main . --rounds 10 --json ab.json  # a branch against the files as they are now
    python records/bench.py 'python old.py' 'python new.py'    # two commands
    python records/bench.py --peer 12 LOG --corpus DIR         # A: our script, B: that of record 12, on one GPU

A and B are commits, `.` or WORKING for the working tree, or commands: two words or more, or the path of a program. A
commit is cloned into a temporary folder and runs --command there, with links to the data that git does not track.
`python` is the one that runs this file. {seed} in a command and BENCH_SEED in its environment: the round's number.

Compared are milliseconds per step by the run's own clock over its steps after the first --skip, from metrics.jsonl or
from the step lines that it prints, ours or the public speedrun's; without either, the time of the whole command. The
interval is that of the mean of the rounds' differences, 95 % by t. An even number of rounds cancels a steady drift.

LOG is your own copy of a log of record 12 or 28 of modded-nanogpt, which begins with a script. The script is patched
(see PEERS) and runs as one process on the shards of DIR, *_train_*.bin and *_val_*.bin. Compared are milliseconds per
1,000 tokens and the last losses, after equally many tokens.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
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
from types import MappingProxyType
from typing import NamedTuple

import torch
from report import Parser, UserError, parse
from scipy.special import stdtrit

TRAINER = Path(__file__).resolve().parent.parent / "train_gpt2.py"
PER_TOKENS, PER_STEP, WHOLE = MEASURES = ("ms per 1,000 tokens", "ms per step", "ms of the whole command")
GRACE = 30  # seconds between SIGTERM and SIGKILL: torchrun needs some to end its processes
GPU_STATE = ("--format=csv --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,"
             "power.limit,temperature.gpu,clocks_event_reasons.sw_power_cap,clocks_event_reasons.sw_thermal_slowdown")
SHORT = "--val-every 10 --val-tokens 1048576 --muon-momentum-start 0.95"
PATCHES = (
    (r"data/fineweb10B/fineweb_(train|val)_", r"CORPUS/*_\1_"), (r"^( +val_tokens.*= )\d+", r"\g<1>1048576"),
    (r"^(import torch)$", r"\1; torch.manual_seed(int(os.environ['BENCH_SEED']))"),
    # Average-form momentum weighs old gradients more while it rises: in a short run it stays constant, as in ours.
    (r"\(1 - frac\) \* 0\.85 \+ frac \* 0\.95", "0.95"))
PEERS = {  # our options that match it, tokens of its update, steps before its clock starts, patches
    # 2024-11-19_FlexAttention/8384493d-dba9-4991-b16b-8696953f5e6d.txt. torch's epsilon for bfloat16 was 2^-7 then.
    "12": (f"--preset five-minute --steps 50 {SHORT}", 524_288, 10, (
        *PATCHES, (r"^( +num_iterations.*= )\d+", r"\g<1>50"), (r"^( +warmdown_iters.*= )\d+", r"\g<1>15"),
        (r"^( +val_loss_every.*= )\d+", r"\g<1>10"), (r"(descent_tuning = )True", r"\1False"),
        (r"(F\.rms_norm\(\w+, \(\w+\.size\(-1\),\))\)", r"\1, eps=2**-7)"))),
    # 2025-08-23_SparseAttnGate/020630eb-2191-4ba2-9ee4-4cdc94316943.txt
    "28": (f"--preset gpt2 --steps 60 --prefix-weight 0 {SHORT}", 393_216, 0, (
        *PATCHES, (r"^( +num_iterations.*= )\d+", r"\g<1>40"), (r"^( +val_loss_every.*= )\d+", r"\g<1>8"),
        ("final/", "")))}


class Contender(NamedTuple):
    what: str
    command: list[str]
    folder: Path  # where it runs
    out: Path  # where it writes; removed after each run
    environment: dict[str, str] = MappingProxyType({})
    batch: int = 0  # tokens of an update, where its log does not say


def git(*words) -> str:
    """What git prints. Raises UserError with its message if it fails."""
    done = subprocess.run(["git", *map(str, words)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git says: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def contender(words: list[str], command: list[str], folder: Path) -> Contender:
    """A commit, the working tree or a command."""
    word, is_working = " ".join(words), words in (["."], ["WORKING"])
    clone, out = folder / "clone", folder / "runs"
    if len(words) > 1 or Path(word).is_file():
        return Contender(shlex.join(words), words, Path.cwd(), out)
    try:
        root = Path(git("rev-parse", "--show-toplevel"))
        commit = git("rev-parse", "--verify", f"{'HEAD' if is_working else word}^{{commit}}")
    except UserError as refusal:
        raise UserError(f"{word!r} is no commit ({refusal}); expected a commit, . for the working tree, or a command "
                      "(git log --oneline lists commits)") from None
    what = git("log", "-1", "--format=%h %s", commit)
    if changed := git("status", "--porcelain", "--untracked-files=no").splitlines():
        what += f" ({'with' if is_working else 'without'} the changes to {len(changed)} file(s) of the working tree)"
    if not is_working:
        git("clone", "--quiet", "--shared", "--no-checkout", root, clone)
        git("-C", clone, "checkout", "--quiet", "--detach", commit)
        for name in git("-C", root, "ls-files", "--others", "--directory", "-z", "data").split("\0"):
            if name and not (link := clone / name).exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(root / name)
    if re.search(r"(train_gpt2\.py|run\.sh)(?!.* --out[ =])", " ".join(command)):
        command = [*command, "--out", str(out)]
    return Contender(what, command, root if is_working else clone, out)


def against_peer(number: str, log: str, corpus: Path, folder: Path) -> list[Contender]:
    """Our script and a patched copy of a peer's."""
    options, batch, _, patches = PEERS[number]
    parts = re.split(r"(?m)^={60,}$", Path(log).read_text(errors="replace"))
    script = next((part.strip() for part in parts if part.strip()), "") + "\n"
    for pattern, new in patches:
        script, count = re.subn(pattern, new, script, flags=re.MULTILINE)
        if not count:
            raise UserError(f"{log} has no {pattern}, so it is not the script of record {number}; give its log")
        print(f"patch of B, {count} times: {pattern} => {new}")
    (folder / "script.py").write_text(script.replace("CORPUS", str(corpus.resolve())), encoding="utf-8")
    ours = ["python", str(TRAINER), *options.split(),
            *(f"--{part}-files={corpus.resolve()}/*_{part}_*.bin" for part in ("train", "val")),
            "--seed", "{seed}", "--out", str(folder / "runs")]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    return [Contender(f"train_gpt2.py {options}", ours, folder, folder / "runs"),
            Contender(f"script of record {number}", ["python", "script.py"], folder, folder / "logs", alone, batch)]


def measured(one: Contender, printed: str, whole: float, skip: int) -> dict:
    """Times by those of MEASURES that a run has, and its losses. whole: seconds of the command."""
    file = next(one.out.rglob("metrics.jsonl"), None)
    kept, _ = parse(file.read_text(), file) if file else parse(printed, Path("output.txt"))
    points = kept["train"] | kept["val"]  # by step
    seconds = {step: line[1] for step, line in kept["step"].items()} | {step: at.seconds for step, at in points.items()}
    losses = {kind: {step: kept[kind][step].loss for step in sorted(kept[kind])} for kind in ("train", "val")}
    steps, times = sorted(seconds), {WHOLE: 1000 * whole}
    if steps and skip >= steps[-1]:
        raise UserError(f"--skip {skip} leaves none of {steps[-1]} steps; give less")
    set_back = [step for last, step in itertools.pairwise(steps) if seconds[step] < seconds[last]]  # as in record 12
    timed = [step for step in steps if step >= max([skip, *set_back])]
    if len(timed) > 1:
        first, last = timed[0], timed[-1]
        times[PER_STEP] = 1000 * (seconds[last] - seconds[first]) / (last - first)
        if tokens := points[last].tokens - points[first].tokens if file else one.batch * (last - first):
            times[PER_TOKENS] = 1e6 * (seconds[last] - seconds[first]) / tokens
    loss = [math.nan, *(losses["val"] or losses["train"]).values()][-1]
    return {"times": times, "steps": steps[-1] if steps else 0, "loss": loss, "losses": losses, "seconds": seconds}


def end(process: subprocess.Popen) -> None:
    """End it and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            if process.poll() is None:
                os.killpg(process.pid, number)
                process.wait(GRACE)


def run_once(name: str, one: Contender, seed: int, options: argparse.Namespace, output: Path) -> dict:
    """Raises UserError for a run that fails or takes too long."""
    command = [word.replace("{seed}", str(seed)) for word in one.command]
    command[0] = sys.executable if command[0] in ("python", "python3") else command[0]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = os.environ | {"PATH": path, "VIRTUAL_ENV": sys.prefix, "BENCH_SEED": str(seed)} | one.environment
    begin = time.perf_counter()
    with open(output, "w") as file:
        process = subprocess.Popen(command, cwd=one.folder, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        timer = threading.Timer(options.timeout, end, [process])  # wait(timeout) would only look every 50 ms
        timer.start()
        try:
            status, whole = process.wait(), time.perf_counter() - begin
        finally:
            timer.cancel()
            end(process)
    printed = output.read_text(errors="replace")
    late = whole >= options.timeout
    if late or status:
        print(*printed.splitlines()[-40:], sep="\n")
        state = f"still ran after {options.timeout:g} s" if late else f"ended with status {status}"
        raise UserError(f"{name} {state}; its last lines are above; its command: {shlex.join(command)}")
    found = measured(one, printed, whole, options.skip)
    shutil.rmtree(one.out, ignore_errors=True)  # weights
    return found


def machine() -> list[str]:
    """Processor, load and versions; clocks, driver and topology of the GPUs."""
    lines = [(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}, "
              f"Python {platform.python_version()}, torch {torch.__version__}")]
    for question in (GPU_STATE, "topo -m") if shutil.which("nvidia-smi") else ():
        lines += re.sub(r"\x1b\[\d*m", "", subprocess.getoutput(f"nvidia-smi {question}")).splitlines()
    return lines


def difference(a: list[float], b: list[float]) -> dict[str, float]:
    """B - A: its mean over the rounds and the 95 % interval."""
    pairs = [y - x for x, y in zip(a, b, strict=True)]
    mean, error = statistics.fmean(pairs), statistics.stdev(pairs) / len(pairs)**0.5
    half = float(stdtrit(len(pairs) - 1, 0.975)) * error
    return {"mean": mean, "low": mean - half, "high": mean + half}


def conclude(runs: dict[str, list[dict]], measures: tuple[str, ...]) -> dict:
    """Prints the differences and the verdict. Returns the numbers."""
    every = runs["A"] + runs["B"]
    measure = next(name for name in measures if all(name in run["times"] for run in every))
    times, losses, curves = ([[part(run) for run in side] for side in runs.values()] for part in (
        lambda run: run["times"][measure], lambda run: run["loss"], lambda run: run["losses"]))
    found = {"measure": measure, "difference_ms": difference(*times)}
    mean, low, high = found["difference_ms"].values()
    percent = found["difference_percent"] = 100 * mean / statistics.fmean(times[0])
    print(f"B - A in {measure}: {mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}; {percent:+.2f} % of A")
    verdict = f"{'B' if mean < 0 else 'A'} is faster by {abs(mean):.3f} ms, {abs(percent):.2f} %"
    verdict = "times differ inside the noise" if low <= 0 <= high else verdict
    if not all(math.isfinite(run["loss"]) for run in every):
        verdict += "; not every run has a finite loss" if any(run["steps"] for run in every) else ""
    elif curves[0] == curves[1]:
        verdict += "; all losses are equal"
    else:
        found["difference_loss"] = difference(*losses)
        mean, low, high = found["difference_loss"].values()
        print(f"B - A in last loss: {mean:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}")
        verdict += ("; losses differ inside the noise" if low <= 0 <= high else
                    f"; {'B' if mean > 0 else 'A'} has the higher loss, by {abs(mean):.4f}")
    print(f"verdict: {verdict}")
    return {**found, "verdict": verdict}


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    gpus = torch.cuda.device_count()
    usual = (f"torchrun --standalone --nproc_per_node={gpus} train_gpt2.py --steps 200 --val-every 0" if gpus else
             "python train_gpt2.py --preset tiny --steps 60 --val-every 0")
    parser = Parser(prog="bench.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("contenders", metavar="A B", nargs="*", type=shlex.split, help="commits, . or commands")
    add("--peer", nargs=2, metavar=("RECORD", "LOG"), help=f"instead: {' or '.join(PEERS)}, and its log")
    add("--corpus", type=Path, metavar="DIR", help="shards for --peer")
    add("--command", type=shlex.split, default=usual, metavar="WORDS", help=f"what a commit runs (default: {usual})")
    add("--rounds", type=int, metavar="N", help="runs of each, 2 or more (default: 6; with --peer 2)")
    add("--skip", type=int, metavar="N", help="first steps that are not timed (default: 10; with --peer 28: 0)")
    add("--cool", type=float, default=0.0, metavar="S", help="seconds of pause between runs (default: 0)")
    add("--timeout", type=float, default=86_400.0, metavar="S", help="most seconds of a run (default: a day)")
    add("--json", metavar="FILE", default=os.devnull, help="write all of it there as well")
    options = parser.parse_args(arguments)
    record = PEERS.get(options.peer[0]) if options.peer else None
    if not (record and options.corpus and not options.contenders or not options.peer and len(options.contenders) == 2):
        parser.error(f"expected A and B, or --peer with {' or '.join(PEERS)} and its log, and --corpus")
    options.rounds = (2 if record else 6) if options.rounds is None else options.rounds
    options.skip = (record[2] if record else 10) if options.skip is None else options.skip
    longest = 1e9  # seconds; more than some systems' clocks hold
    good = 0 <= options.cool <= longest and 0 < options.timeout <= longest
    if options.rounds < 2 or options.skip < 0 or not good:
        parser.error("expected --rounds of at least 2, no --skip below 0, --cool and --timeout of 0 to 1e9 seconds")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    open(options.json, "a").close()  # refused before anything is run; what is there stays until all is known
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        sides = dict(zip("AB", against_peer(*options.peer, options.corpus, folder) if options.peer else [
            contender(words, options.command, folder / str(i)) for i, words in enumerate(options.contenders)]))
        before = machine()
        print(*(f"{label}: {one.what}" for label, one in sides.items()), *before, sep="\n", flush=True)
        runs: dict[str, list[dict]] = {"A": [], "B": []}
        for turn in range(2 * options.rounds):
            label, seed = "ABBA"[turn % 4], turn // 2 + 1
            time.sleep(options.cool if turn else 0)
            run = run_once(f"{label} in round {seed}", sides[label], seed, options, folder / "output.txt")
            runs[label].append(run)
            times = ", ".join(f"{value:.3f} {measure}" for measure, value in reversed(run["times"].items()))
            print(f"{label} in round {seed}: {times}; {run['steps']} steps, last loss {run['loss']:.4f}", flush=True)
        print(*(after := machine()), sep="\n")
        record = {**{label: one.what for label, one in sides.items()}, "skip": options.skip, "machine": before,
                  "commands": {label: one.command for label, one in sides.items()}, "after": after,
                  "runs": runs, **conclude(runs, MEASURES if options.peer else MEASURES[1:])}
        text = json.dumps(json.loads(json.dumps(record), parse_constant=lambda _: None), indent=1)  # NaN: null
        Path(options.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # so that the temporary folder is removed
        signal.signal(number, lambda sent, _frame: sys.exit(128 + sent))
    try:
        main()
    except OSError as error:
        raise UserError(str(error)) from None
