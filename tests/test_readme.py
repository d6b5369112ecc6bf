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
MINE = "--train-files 'data/mine/text_train_*.bin' --val-files 'data/mine/text_val_*.bin'"
COMMANDS = {  # what is added to make them short, in the order in which they run
    "python data/text.py": "", "./run.sh": SHORT, "./run.sh check": "", "./run.sh doctor": "",
    "python data/text.py book.txt --out data/mine": "",
    f"python train_gpt2.py --preset tiny {MINE}": f"{SHORT} --repeat true",
    'python evals/sample.py logs/RUN --prompt "ROMEO:"': "--tokens 20",
    "python evals/export.py logs/RUN/model.pt": "",
    "python records/timing.py --memory-only true --gpu-memory 24": "",
    "python records/timing.py --preset tiny": "--timed-steps 2 --width 32", "python records/parts.py": "",
    "python records/pictures.py": "", "python records/size.py": "",
    "python records/kernels.py --preset tiny": "--width 32",
    "python records/report.py plot records/runs.png records/2026-11-24_hundred-second_tiny_2-core_cpu "
    "records/2026-11-24_tiny_shakespeare_2-core_cpu": ""}
NOT_RUN = {  # the reason, and which
    "runs these tests": r"\./run.sh test.*", "needs a network": r"python data/fineweb.py.*|python evals/hellaswag.py.*",
    "needs GPUs": r"for stage.*|torchrun.*|TORCH_DISABLE.*|tests/gpu.sh.*"
                  r"|python train_gpt2.py( --(preset five|recompute|seed|save-every).*)?"
                  r"|python records/kernels.py --preset gpt2.*|python records/ladder.py --size 124M.*",
    "minutes": r"python records/ladder.py --train-files.*|python train_gpt2.py --preset tiny.*|\./run.sh --.*"
               r"|python data/text.py input.txt.*",
    "needs the history of the repository": r"python records/(bench|size).py.*",
    "a placeholder, or another form of one that runs": r"python records/\w+.py.*|WORLD_SIZE=8 .*|python evals/.*"
                                                       r"|python train_gpt2.py --(resume.*|help)"}


def documented_commands() -> set[str]:
    """Lines of code blocks, inline code and heads of scripts that start with a command of ours, without comments."""
    text = "".join((ROOT / name).read_text() for name in ("README.md", "records/README.md", "records/DETAILS.md"))
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


def test_every_documented_command_is_run_here_or_has_a_reason():
    unknown = [command for command in documented_commands() - set(COMMANDS)
               if not any(re.fullmatch(pattern, command) for pattern in NOT_RUN.values())]
    assert not unknown


EXPECTED = {"check": "ok: this machine", 'logs/RUN --prompt "ROMEO:': "ROMEO:",
            "train_gpt2.py --preset": "final val_loss", "text.py": "train on them with",
            "gpu-memory": "GiB", "doctor": "ready", "export.py": "model.safetensors", "parts.py": "million tokens/s"}


def assert_run_sh_trains_and_goes_on(copy):
    """From another folder, from which relative files are meant; a resumed run with the options of its own."""
    output = run(f"{copy}/run.sh {SHORT} --steps 4 --save-every 1 --seed 3 --out=--mine/runs", copy, cwd=copy.parent)
    assert "final val_loss" in output and "a sample of what it learned" in output and "def " in output
    assert f"work after: cd {copy}" in output
    checkpoint, = (copy.parent / "--mine" / "runs").glob("*/checkpoint_0000002.pt")
    (checkpoint.parent / "model.pt").unlink()
    shutil.copytree(copy / "data" / "text", copy.parent / "mine" / "text")
    files = "--train-files 'mine/text/text_train_*.bin' --val-files='mine/text/text_val_*.bin'"
    output = run(f"{copy}/run.sh --resume={checkpoint.parent.relative_to(copy.parent)} {files}", copy, cwd=copy.parent)
    assert "resumed after step 2 from" in output and "a sample of what it learned" in output
    assert (checkpoint.parent / "model.pt").exists()
    shutil.copytree(checkpoint.parent, copy / "logs" / checkpoint.parent.name)  # for the commands that follow


SLOW = (  # what they do at length has tests of its own
    "./run.sh check", "python records/timing.py --preset tiny", "python records/kernels.py --preset tiny",
    "python records/timing.py --memory-only true --gpu-memory 24", "python records/parts.py",
    "python records/pictures.py", "./run.sh doctor")


@pytest.mark.parametrize("command", [pytest.param(command, marks=[pytest.mark.slow] * (command in SLOW))
                                     for command in COMMANDS])
def test_command(command, copy):
    assert command in documented_commands() or command == "python data/text.py"  # which makes the text of the others
    if command == "./run.sh":
        assert_run_sh_trains_and_goes_on(copy)
        return
    runs = sorted((copy / "logs").glob("*/model.pt"))
    output = run(f"{command} {COMMANDS[command]}".replace("logs/RUN", str(runs[-1].parent) if runs else ""), copy)
    for part, text in EXPECTED.items():
        if part in command:
            assert text in output


def test_run_sh_says_what_it_does_and_passes_arguments_on(copy):
    refused = call("./run.sh --stepz 3", copy)
    assert refused.returncode != 0
    assert "==> no GPU: training the tiny model on this CPU" in refused.stdout
    assert "--steps" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("arguments, status, expected", [
    ("--help", 0, "--tokens-per-step"), ("tests", 2, "expected test")])
def test_other_ways_to_call_run_sh(copy, arguments, status, expected):
    done = call(f"{copy}/run.sh {arguments}", copy)
    assert done.returncode == status and expected in done.stdout + done.stderr


def test_threads_that_wait_give_way_where_another_program_runs(copy, tmp_path):
    """run.sh looks for one before python starts; here python only says what it would have used."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/bash\n[[ "$1" == - ]] || echo "spins ${GOMP_SPINCOUNT:-as it likes}"\n')
    stub.chmod(0o755)
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        done = call(f"PATH={tmp_path}:$PATH; ./run.sh check", copy)
        assert "spins 1000" in done.stdout
        assert "spins 77" in call(f"PATH={tmp_path}:$PATH; GOMP_SPINCOUNT=77 ./run.sh check", copy).stdout
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("failing", [
    "tests", "tests/test_checkpoint.py", "tests/test_processes.py", "tests/test_readme.py", "none"])
def test_run_sh_fails_if_any_test_fails(copy, tmp_path, failing):
    """Also where other tests take longer: the last to end are those in front, whose first argument is tests."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1 $2" = "-m pytest" ] || exit 0\n[ "$4" = {failing} ] && exit 1\n'
                      '[ "$4" = tests ] && sleep 1\nexit 0\n')
    python.chmod(0o755)
    done = call(f"PATH={tmp_path}:$PATH VIRTUAL_ENV={tmp_path} ./run.sh test", copy)
    assert done.returncode == (failing != "none")
