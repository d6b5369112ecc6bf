"""run.sh and every command of the README, run in a copy of the repository. What needs a GPU, a network or minutes is
named with the reason; a command that the README gains must be added here."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SHORT = "--steps 2 --val-every 0 --val-tokens 2048 --width 32"  # added to training commands
FEW_RUNS = "--steps 6 --seeds 1 --rungs windows --out logs/ladder"  # added to the ladder
FEW_STEPS = "--timed-steps 2 --width 32"
TEXT_FILES = "--train-files 'data/text/text_train_*.bin' --val-files 'data/text/text_val_*.bin'"
NEEDS_GPU, NEEDS_NETWORK = "needs a GPU", "needs a network"
COMMANDS = {
    "./run.sh": SHORT,
    "./run.sh test": "runs these tests",
    "./run.sh --resume logs/RUN": "see test_run_sh_goes_on_with_a_run",
    "./run.sh test -m slow tests": "runs these tests",
    "./run.sh test -m slow tests/test_hosts.py": "runs these tests",
    "./run.sh test -m slow -s tests/test_checkpoint.py tests/test_hosts.py tests/test_fuzz.py": "runs these tests",
    "torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=FIRST:29400 --rdzv-id=run1 "
    "--max-restarts=3 train_gpt2.py --save-every 100 --resume auto": "needs two machines",
    "./run.sh check": "",
    "python records/timing.py --memory-only true --gpu-memory 24": "",
    "python data/fineweb.py 10": NEEDS_NETWORK,
    "python data/fineweb.py 31": NEEDS_NETWORK,
    "torchrun --standalone --nproc_per_node=8 train_gpt2.py --preset gpt2-medium": NEEDS_GPU,
    "torchrun --standalone --nproc_per_node=8 train_gpt2.py --preset gpt2-xl --save-every 500 --resume auto": NEEDS_GPU,
    "torchrun --standalone --nproc_per_node=8 train_gpt2.py": NEEDS_GPU,
    "torchrun --standalone --nproc_per_node=N train_gpt2.py": NEEDS_GPU,
    "torchrun --standalone --nproc_per_node=8 records/timing.py": NEEDS_GPU,
    "python train_gpt2.py": NEEDS_GPU,
    "python train_gpt2.py --preset five-minute": NEEDS_GPU,
    "python train_gpt2.py --recompute true --loss-chunk 2048": NEEDS_GPU,
    "python train_gpt2.py --save-every 200 --resume auto": NEEDS_GPU,
    "python data/text.py": "",
    "./run.sh doctor": "--preset tiny",
    "python records/doctor.py --preset tiny": "is the same",
    "python records/doctor.py OPTIONS": "a placeholder",
    "python train_gpt2.py --preset tiny": SHORT,
    "python train_gpt2.py --help": "",
    'python evals/sample.py logs/RUN/model.pt --prompt "def "': "--tokens 20",
    'python evals/sample.py logs/RUN/model.pt --prompt "def " --prompt "class " --top-k 40': "--tokens 20",
    "python evals/hellaswag.py logs/RUN/model.pt": NEEDS_NETWORK,
    "python evals/export.py logs/RUN/model.pt": "",
    "python data/text.py input.txt --out data/shakespeare": "",
    "python data/text.py book.txt --out data/mine": "",
    'python evals/sample.py logs/RUN --prompt "ROMEO:"': "--tokens 20",
    'python evals/sample.py logs/RUN --prompt "class Reader:" --tokens 420 --temperature 0.7 --seed 3': "--top-k 5",
    "python records/timing.py --preset tiny": FEW_STEPS,
    "python records/timing.py --memory-only true --recompute true": "",
    f"python records/ladder.py {TEXT_FILES} --steps 160 --seeds 3 --leave-one-out --jobs 2": FEW_RUNS,
    "python records/ladder.py --size 124M --steps 1600 --leave-one-out": NEEDS_GPU,
    "python records/ladder.py --help": "",
    "python records/timing.py --help": "",
    "python records/ladder.py OPTIONS": "a placeholder",
    "python records/check.py --store": "changes what ./run.sh check compares with",
    "python records/parts.py": "",
    "python records/pictures.py": "",
    "python records/check.py": "is ./run.sh check",
    "./run.sh test -m gpu tests": "runs these tests",
    "python records/kernels.py --preset gpt2 --stage last": NEEDS_GPU,
    "python records/kernels.py --preset tiny": "--width 32",
    "python records/kernels.py OPTIONS": "a placeholder",
    "python records/side_by_side.py OPTIONS": "a placeholder",
    "python records/side_by_side.py --corpus DIR --ours NAME=OPTIONS --peer NAME=FILE --batch NAME=TOKENS --out ENTRY":
    "a placeholder",
    "python records/bench.py A B": "a placeholder",
    "python records/report.py plot records/runs.png records/2026-11-24_hundred-second_tiny_2-core_cpu "
    "records/2026-11-24_tiny_shakespeare_2-core_cpu": "",
    "./run.sh --seed 1": "is ./run.sh",
    **{f"python records/bench.py {rest}": "needs the history of this repository, which a copy has not" for rest in (
        "HEAD~1 HEAD", "main . --rounds 10 --json ab.json", "'python old.py' 'python new.py'")},
    "python records/timing.py OPTIONS": "a placeholder",
    "torchrun --standalone --nproc_per_node=8 train_gpt2.py --seed K": NEEDS_GPU,
    "python train_gpt2.py --seed K": NEEDS_GPU,
    "python train_gpt2.py --seed K --micro-tokens auto": NEEDS_GPU,
    **{f"python records/report.py {rest}": "a placeholder" for rest in (
        "show RUN...", "verify --target 3.28 RUN...", "verify --target 3.28 --planned N RUN...",
        "verify --target 1.9076 --planned N RUN...", "compare A B", "plot OUT.png RUN...", "band RUN", "band logs/RUN",
        "OPTIONS")},
}
MINE = "--train-files 'data/mine/text_train_*.bin' --val-files 'data/mine/text_val_*.bin'"
COMMANDS[f"python train_gpt2.py --preset tiny {MINE}"] = f"{SHORT} --repeat true"
SHAKESPEARE = "--train-files 'data/shakespeare/*train*.bin' --val-files 'data/shakespeare/*val*.bin'"
COMMANDS[f"python train_gpt2.py --preset tiny --steps 130 --val-every 10 --seed 10 {SHAKESPEARE}"] = (
    "--val-tokens 2048 --width 16")
COMMANDS[f"python records/ladder.py {SHAKESPEARE} --steps 160 --seeds 3 --leave-one-out --jobs 2"] = FEW_RUNS
ORDER = list(COMMANDS)


def documented_commands() -> set[str]:
    """Lines of code blocks, inline code and heads of scripts that start with a command of ours, without comments."""
    text = (ROOT / "README.md").read_text() + (ROOT / "records" / "README.md").read_text()
    heads = [ast.get_docstring(ast.parse(path.read_text())) or "" for path in (ROOT / "records").glob("*.py")]
    blocks = "\n".join([*re.findall(r"```\n(.*?)```", text, re.S), *heads]).replace("\\\n", " ")
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    lines = [re.split(r"\s+# ", line)[0].strip() for line in [*blocks.splitlines(), *inline]]
    return {re.sub(r"\s+", " ", line) for line in lines if re.match(r"(\./run\.sh|python \S+\.py|torchrun )", line)}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """What git would clone, so that nothing is left behind here, with some text for the commands that name it."""
    folder = tmp_path_factory.mktemp("clone") / "repository"
    ignored = shutil.ignore_patterns(".git", ".venv", "logs", "fineweb10B", "text", "__pycache__", ".pytest_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / "book.txt").write_text("Call me Ishmael.\n" * 50)
    (folder / "input.txt").write_text("First Citizen: Before we proceed any further, hear me speak.\n" * 5000)
    return folder


def call(command: str, folder: Path) -> subprocess.CompletedProcess:
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
                   "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=300)


def run(command: str, folder: Path, cwd: Path | None = None) -> str:
    done = call(command, cwd or folder)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_only_commands_that_are_known_here_are_documented():
    assert documented_commands() - set(COMMANDS) == set()


def can_run(command: str) -> bool:
    return COMMANDS[command] == "" or COMMANDS[command].startswith("--")


@pytest.mark.parametrize("command", [command for command in ORDER if can_run(command)])
def test_command(command, copy):
    if command not in documented_commands() and command != "python data/text.py":  # which makes the text of the others
        pytest.skip("no longer documented")
    if command == "./run.sh":
        output = run(f"{copy}/run.sh {SHORT}", copy, cwd=copy.parent)  # from any folder
        assert "final val_loss" in output and "a sample of what it learned" in output and "def " in output
        return
    runs = sorted((copy / "logs").glob("*/model.pt"))
    output = run(f"{command} {COMMANDS[command]}".replace("logs/RUN", str(runs[-1].parent) if runs else ""), copy)
    expected = {"check": "ok: this machine", "train_gpt2.py --help": "--tokens-per-step",
                "sample.py logs/RUN/model.pt": "def ", "logs/RUN --prompt \"ROMEO:": "ROMEO:",
                "train_gpt2.py --preset": "final val_loss", "text.py": "train on them with", "timing.py": "memory",
                "doctor": "ready to train", "export.py": "model.safetensors",
                "parts.py": "million tokens/s", "ladder.py --": "ladder.md"}
    for part, text in expected.items():
        if part in command:
            assert text in output


def test_run_sh_says_what_it_does_and_passes_arguments_on(copy):
    refused = call("./run.sh --stepz 3", copy)
    assert refused.returncode != 0
    assert "==> no GPU: training the tiny model on this CPU" in refused.stdout
    assert "--steps" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("arguments, status, expected", [
    ("--help", 0, "--tokens-per-step"), ("tests", 2, "expected test"),
    (f"--preset tiny {SHORT}", 0, "a sample of what it learned")])
def test_other_ways_to_call_run_sh(copy, arguments, status, expected):
    done = call(f"{copy}/run.sh {arguments}", copy)
    assert done.returncode == status and expected in done.stdout + done.stderr


def test_run_sh_goes_on_with_a_run(copy, tmp_path):
    """From another folder, with the options of the run itself."""
    short = f"{SHORT} --out {tmp_path}/logs --save-every 1"
    done = call(f"{copy}/run.sh {short} --preset tiny --seed 3", tmp_path)
    assert done.returncode == 0, done.stderr
    checkpoint, = (tmp_path / "logs").glob("*/checkpoint_0000001.pt")
    (checkpoint.parent / "model.pt").unlink()
    run = checkpoint.parent.relative_to(tmp_path)
    going_on = call(f"{copy}/run.sh --resume {run}", tmp_path)
    assert going_on.returncode == 0, going_on.stderr
    assert "resumed after step 1 from" in going_on.stdout and "a sample of what it learned" in going_on.stdout
    assert (checkpoint.parent / "model.pt").exists()


@pytest.mark.parametrize("spelling", ["--train-files {} --val_files {} --out {}",
                                      "--train-files={} --val_files={} --out={}"])
def test_relative_files_are_meant_from_where_the_user_stands(copy, tmp_path, spelling):
    shutil.copytree(copy / "data" / "text", tmp_path / "mine")
    files = spelling.format("'mine/text_train_*.bin'", "'mine/text_val_*.bin'", "runs")
    done = call(f"{copy}/run.sh {SHORT} {files}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").glob("*/model.pt"))) == 1
