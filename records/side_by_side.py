"""Our presets and scripts of others on one GPU, in turn, on the same shards: time per token, loss at equal tokens and
at equal seconds.

    python records/side_by_side.py --corpus DIR --ours NAME=OPTIONS --peer NAME=FILE --batch NAME=TOKENS --out ENTRY

OPTIONS are those of train_gpt2.py. FILE lies outside the repository: a script, or a log that begins with one, which is
cut out. It runs as the one process of `torchrun --nproc_per_node=1`, in a folder of its own whose data/fineweb10B/
leads to the shards of DIR (*_train_*.bin, *_val_*.bin), and writes a log as the public speedrun has them into logs/
there. --batch says how many tokens one update of it takes. What it needs to run here is changed in a copy by

    --replace 'NAME:PATTERN=>TEXT'    a regular expression, to be found at least once; TEXT may say \\1 and \\g<1>

and stated in the entry. --rounds N runs all of them N times in turn, --limit S ends one after S seconds: what it has
logged until then counts. ENTRY is a new folder: README.md with table, machine and options, figures.json, and logs of
our runs; of others only figures are kept. --work DIR (default logs/side_by_side) keeps the rest. Status 1: one failed.

A clock that is set back to zero after some steps gets these at the mean of the others. Losses are those of validations
(training losses where one has none), straight between two of them. Records 12 and 28 of modded-nanogpt, from the logs
in its folder records/track_1_short:

    --ours 'five-minute=--preset five-minute --steps 50 --val-every 10 --val-tokens 1048576'
    --peer r12=2024-11-19_FlexAttention/8384493d-dba9-4991-b16b-8696953f5e6d.txt --batch r12=524288
    --replace 'r12:^( +num_iterations.*= )\\d+=>\\g<1>50' --replace 'r12:^( +warmdown_iters.*= )\\d+=>\\g<1>15'
    --replace 'r12:^( +val_loss_every.*= )\\d+=>\\g<1>10' --replace 'r12:^( +val_tokens.*= )\\d+=>\\g<1>1048576'
    --replace 'r12:(descent_tuning = )True=>\\1False' --replace 'r12:(step/)500=>\\g<1>13'

    --ours 'gpt2=--preset gpt2 --steps 60 --val-every 10 --val-tokens 1048576'
    --peer r28=2025-08-23_SparseAttnGate/020630eb-2191-4ba2-9ee4-4cdc94316943.txt --batch r28=393216
    --replace 'r28:^( +num_iterations.*= )\\d+=>\\g<1>40' --replace 'r28:^( +val_loss_every.*= )\\d+=>\\g<1>8'
    --replace 'r28:^( +val_tokens.*= )\\d+=>\\g<1>1048576' --replace 'r28:(step / )300=>\\g<1>8'
    --replace 'r28:final/=>'
"""

import argparse
import datetime
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

HERE, DATA = Path(__file__).resolve().parent, Path("data/fineweb10B")  # where scripts of the speedrun look for shards
sys.path[:0] = [str(HERE.parent), str(HERE)]
import report

import train_gpt2
from train_gpt2 import Refusal


class Runner(NamedTuple):
    name: str
    command: list[str]  # after `python`
    script: str  # written to its folder, where it is not ours
    tokens: tuple[int, ...]  # of an update, where its log does not say
    notes: str  # for the entry


def pair(text: str, option: str, middle: str = "=") -> tuple[str, str]:
    name, found, value = text.partition(middle)
    if not (re.fullmatch(r"[\w.-]+", name) and found and value):
        raise Refusal(f"{option} {text} is not NAME{middle}VALUE; for example {option} record12{middle}...")
    return name, value


def our_runner(name: str, words: str) -> Runner:
    options = [*shlex.split(words), "--train-files", f"{DATA}/fineweb_train_*.bin",
               "--val-files", f"{DATA}/fineweb_val_*.bin", "--out", "logs"]
    train_gpt2.parse_command_line(options)  # raises Refusal before anything runs
    return Runner(name, [str(HERE.parent / "train_gpt2.py"), *options], "", (),
                  f"`python train_gpt2.py {words}`")


def peer_runner(name: str, path: str, batch: str, changes: list[str]) -> Runner:
    """Raises Refusal where there is no such script, or nothing in it to replace."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"cannot read {path}: {error}; expected a script, or a log that begins with one") from None
    rule = report.RULE.match(text)  # some logs have one above the script too
    script = original = report.RULE.split(text[rule.end() if rule else 0:])[0].strip() + "\n"
    notes = []
    for change in changes:
        pattern, arrow, new = change.partition("=>")
        try:
            script, count = re.subn(pattern, new, script, flags=re.MULTILINE)
        except (re.error, IndexError) as error:
            raise Refusal(f"--replace {name}:{change}: {error}; expected a regular expression and a text") from None
        if not arrow or not count:
            raise Refusal(f"--replace {name}:{change} changes nothing in {path}, expected PATTERN=>TEXT with a PATTERN "
                          "that is found; look into the script")
        notes.append(f"`{pattern}` by `{new}` ({count})")
    if not batch.isdecimal():
        raise Refusal(f"--batch {name}={batch} is not a number of tokens; for example --batch {name}=524288")
    digest = hashlib.sha256(original.encode()).hexdigest()[:12]
    return Runner(name, ["script.py"], script, (int(batch),),
                  f"script {digest}; replaced: {', '.join(notes) or 'nothing'}")


def shards(corpus: Path) -> dict[str, Path]:
    """Names below DATA, and the files that they lead to, both in order. Raises Refusal."""
    links = {f"fineweb_{part}_{number:06}.bin": path.resolve() for part in ("train", "val")
             for number, path in enumerate(sorted(corpus.glob(f"*_{part}_*.bin")))}
    if len({name.split("_")[1] for name in links}) < 2:
        raise Refusal(f"{corpus} lacks *_train_*.bin or *_val_*.bin, expected shards; make some: python data/text.py "
                      f"TEXT... --out {corpus}")
    return links


def started(runner: Runner, folder: Path, links: dict[str, Path], limit: float) -> int | None:
    """Run one to its end in its folder. Returns its status; None after the limit: it and all it started are gone."""
    (folder / DATA).mkdir(parents=True)
    for name, target in links.items():
        (folder / DATA / name).symlink_to(target)
    if runner.script:
        (folder / "script.py").write_text(runner.script, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with open(folder / "output.txt", "w", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, *runner.command], cwd=folder, env=os.environ | alone, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()  # the next one needs the GPU's memory


class Result(NamedTuple):
    folder: Path
    status: int | None
    run: report.Run | None
    late: int  # steps that its clock left out
    points: list[report.Point]  # with seconds as if it had not


def result_of(runner: Runner, folder: Path, status: int | None) -> Result:
    logs = sorted((folder / "logs").rglob("*.txt"), key=lambda path: path.stat().st_mtime)
    run = next(filter(None, (report.read_log(path, runner.tokens) for path in reversed(logs))), None)
    points = [] if run is None or not run.average > 0 else run.val if len(run.val) > 1 else run.train
    if not points or not points[-1].tokens:
        return Result(folder, status, None, 0, [])
    late, pace = max(0, round(run.steps - 1000 * run.seconds / run.average)), run.average / 1000
    return Result(folder, status, run, late, [
        point._replace(seconds=point.step * pace if point.step < late else point.seconds + late * pace)
        for point in points])


def figures_of(results: list[Result]) -> tuple[list[list[str]], list[dict]]:
    """The table, and the same with all points for figures.json."""
    tokens, seconds, loss = map(attrgetter, ("tokens", "seconds", "loss"))
    places = [(key, share * min((key(result.points[-1]) for result in results if result.points), default=0))
              for key in (tokens, seconds) for share in (0.5, 1)]
    kept, rows = [], [["run", "steps", "tokens", "seconds", "ms per 1,000 tokens", *(
        f"loss at {place:,.0f} tokens" if key is tokens else f"loss at {place:.1f} s" for key, place in places), ""]]
    for folder, status, run, late, points in results:
        remarks = [f"FAILED, status {status}"] if status else ["ended by --limit"] * (status is None)
        if not points:
            rows.append([folder.name, *[""] * (len(rows[0]) - 2), "; ".join(remarks) or "no losses in its log"])
            continue
        last, remarks = points[-1], remarks + ["training losses"] * (points[-1] in run.train)
        remarks += [f"the clock began after {late} steps"] * (late > 0)
        losses = [report.between(points, place, key, loss) for key, place in places]
        pace = 1e6 * last.seconds / last.tokens
        rows.append([folder.name, f"{last.step:,}", f"{last.tokens:,}", f"{last.seconds:.2f}", f"{pace:.3f}",
                     *("" if math.isnan(value) else f"{value:.4f}" for value in losses), "; ".join(remarks)])
        kept.append({"run": folder.name, "ms per 1000 tokens": pace, "remarks": remarks,
                     "points": [point._asdict() for point in points]})
    return rows, kept


def write_entry(entry: Path, runners: list[Runner], results: list[Result], links: dict[str, Path]) -> str:
    """The folder of this comparison. Returns its text."""
    rows, kept = figures_of(results)
    own = [result for result in results if result.run and result.run.config]
    machine, version = (own[0].run.hardware, own[0].run.torch) if own else ("machine unknown", "unknown")
    train, val = (sum((path.stat().st_size - 1024) // 2 for name, path in links.items() if part in name)
                  for part in ("_train_", "_val_"))
    text = f"""# Side by side, {datetime.date.today():%d %B %Y}

{machine}, torch {version}; one process; all in turn, on the same {train:,} training and {val:,} validation tokens.

{report.table(rows)}

{chr(10).join(f"- {runner.name}: {runner.notes}" for runner in runners)}

Validation and compiling are not timed, as each script has it. Short runs squeeze schedules: no loss of a whole run.
"""
    entry.mkdir(parents=True)
    (entry / "README.md").write_text(text, encoding="utf-8")
    (entry / "figures.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for result in own:
        (entry / result.folder.name).mkdir()
        shutil.copy(result.run.path, entry / result.folder.name)
        shutil.copy(result.run.path.with_name("metrics.jsonl"), entry / result.folder.name)
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = report.Parser(prog="python records/side_by_side.py", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("corpus", "out", "ours", "peer", "batch", "replace"):
        parser.add_argument(f"--{name}", **{"type": Path, "required": True} if name in ("corpus", "out") else
                            {"action": "append", "default": []})
    parser.add_argument("--rounds", type=report.count, default=1)
    parser.add_argument("--limit", type=report.above_zero, default=280)
    parser.add_argument("--work", type=Path, default=Path("logs/side_by_side"))
    options = parser.parse_args(arguments)
    batch, changes = dict(pair(text, "--batch") for text in options.batch), {}
    for text in options.replace:
        name, change = pair(text, "--replace", ":")
        changes.setdefault(name, []).append(change)
    peers = dict(pair(text, "--peer") for text in options.peer)
    for name in {*batch, *changes} - {*peers}:
        raise Refusal(f"--batch or --replace is for {name}, which is no --peer; the nearest is "
                      f"{train_gpt2.nearest(name, [*peers, '--peer'])}")
    runners = [our_runner(*pair(text, "--ours")) for text in options.ours]
    runners += [peer_runner(name, path, batch.get(name, ""), changes.get(name, [])) for name, path in peers.items()]
    links = shards(options.corpus)
    if len({runner.name for runner in runners}) < len(runners) or not runners:
        raise Refusal("expected one or more of --ours and --peer, each with a NAME of its own")
    if options.out.exists():
        raise Refusal(f"{options.out} exists, expected a new folder; name another one with --out")
    work, results = options.work.resolve() / f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}", []
    for number, runner in [(number, runner) for number in range(options.rounds) for runner in runners]:
        folder = work / f"{runner.name}-{number}"
        results.append(result_of(runner, folder, started(runner, folder, links, options.limit)))
        print(f"{folder.name}: status {results[-1].status}, {len(results[-1].points)} losses", flush=True)
        if results[-1].status:
            print(*(folder / "output.txt").read_text(errors="replace").splitlines()[-40:], sep="\n")
    print("\n" + write_entry(options.out, runners, results, links) + f"\nall of it in {work}")
    return int(any(result.status or not result.points for result in results))


if __name__ == "__main__":
    sys.exit(main())
