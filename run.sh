#!/usr/bin/env bash
# The one command for a fresh machine.
#
#   ./run.sh [OPTIONS]   train: gpt2 on all GPUs, or tiny on a CPU, then print a sample; OPTIONS go to the script
#                        (a --preset among them replaces that choice)
#   ./run.sh test        run the tests; further arguments go to pytest
#   ./run.sh doctor      check this machine before money is spent on it; OPTIONS as for training
#   ./run.sh check       20 small steps, compared with stored losses: does this machine compute our numbers?
set -euo pipefail
from=$PWD
CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' run.sh
    [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" || ! -d .venv ]] || source .venv/bin/activate
    python train_gpt2.py --help 2>/dev/null ||
        echo "All settings, once ./run.sh has installed what they need: python train_gpt2.py --help"
    exit
fi

# An environment that is active is used as it is given; without one, .venv is made beside this file.
first=""  # what the user's shell needs before the commands at the end
[[ "$from" == "$PWD" ]] || first="cd $(printf %q "$PWD"); "
if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
    first+=". .venv/bin/activate; "
    if [[ ! -x .venv/bin/python ]]; then
        say "making the Python environment .venv"
        python3 -m venv .venv
    fi
    source .venv/bin/activate
fi

install() {  # only what is missing, so that a second run starts at once
    python - "$1" <<'PYTHON' && return
import sys
from importlib.metadata import PackageNotFoundError, version
for line in open(sys.argv[1]):
    name, _, wanted = line.split("#")[0].strip().partition("==")
    try:
        if name and version(name).partition("+")[0] != wanted:
            sys.exit(1)
    except PackageNotFoundError:
        sys.exit(1)
PYTHON
    say "installing $1"
    python -m pip install --quiet --disable-pip-version-check --no-compile -r "$1"
    PYTHONDONTWRITEBYTECODE="" python -c "import $2"  # compiles what is used; pip would compile all: half a minute
}

install requirements.txt "train_gpt2, torch._inductor.compile_fx"
# Threads that wait for others spin, which is fastest on a quiet machine; where other programs run, they give way.
busy=0
for _ in {1..5}; do
    read -r _ _ _ running _ 2>/dev/null </proc/loadavg || running=1  # this script itself; macOS has no such file
    [[ "${running%/*}" -le 1 ]] || busy=$((busy + 1))
    sleep 0.02
done
if [[ "${1:-}" == test || $busy -ge 3 ]]; then export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}; fi
[[ "$from" == "$PWD" ]] || say "commands that are named below work after: ${first%; }"
case "${1:-}" in
test)
    shift
    install requirements-dev.txt "pytest, hypothesis, matplotlib.pyplot, scipy.stats"
    say "running the tests"
    [[ $# -eq 0 ]] || exec python -m pytest "$@"
    resuming=(tests/test_{checkpoint,command_line}.py)  # much of their time is waiting
    starting=(tests/test_{processes,data_scripts,evals}.py)
    calling=(tests/test_{readme,bench,ladder,report}.py)
    apart=("${resuming[@]}" "${starting[@]}" "${calling[@]}")
    output=$(mktemp -d) parts=() status=0
    python -m pytest -q "${resuming[@]}" >"$output/1" 2>&1 & parts+=($!)
    python -m pytest -q "${starting[@]}" >"$output/2" 2>&1 & parts+=($!)
    python -m pytest -q "${calling[@]}" >"$output/3" 2>&1 & parts+=($!)
    python -m pytest -q tests "${apart[@]/#/--ignore=}" || status=1
    for part in "${parts[@]}"; do wait "$part" || status=1; done
    cat "$output"/* && rm -r "$output"
    exit $status ;;
check)
    shift
    say "comparing 20 small steps with the stored losses"
    exec python records/check.py "$@" ;;
doctor | "" | --*) ;;
*)
    echo "run.sh: unknown command $1; expected test, check, doctor, or options of train_gpt2.py (./run.sh --help);" \
        "for a sample: python evals/sample.py logs" >&2
    exit 2 ;;
esac

preset="" files="" resume="" device="" option="" words=()
for word in "$@"; do  # an option, its value, or option=value; relative files are meant from where the user stands
    if [[ "$word" == --* ]]; then option=${word%%=*}; fi
    text=${word#--*=}
    case "$option $text" in
    "$word $word" | "--resume none" | "--resume auto") ;;
    --preset\ *) preset=$text ;;
    --device\ *) device=$text ;;
    --train[-_]files\ * | --val[-_]files\ * | --out\ * | --resume\ *)
        here=$from
        [[ "$option" != *files ]] || here=${from//\[/[[]}  # a bracket is meant as one
        [[ "$text" == /* || "$text" == "~"* ]] || word=${word%"$text"}$here/$text
        case "$option" in --train* | --val*) files=$text ;; --resume) resume=$text ;; esac ;;
    esac
    words+=("$word")
done
set -- ${words[@]+"${words[@]}"}

if [[ "${1:-}" == doctor ]]; then
    shift
    exec python records/doctor.py "$@"
fi
gpus=0
if [[ "$device" != cpu ]] && command -v nvidia-smi >/dev/null; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
fi
if [[ -z "$preset$resume" && "$gpus" == 0 ]]; then
    preset=tiny
    set -- --preset tiny "$@"
fi
if [[ "$preset" != tiny && "$gpus" != 0 ]]; then
    if [[ -z "$files$resume" ]]; then
        case "$preset" in gpt2-medium) shards=20 ;; gpt2-xl) shards=80 ;; *) shards=10 ;; esac
        say "fetching FineWeb where it is missing (validation and $shards training shards of 200 MB)"
        python data/fineweb.py "$shards"
    fi
    fit=$(python records/timing.py --fit "$@")  # settings that make it fit into these GPUs
    say "training on $gpus GPU(s)${fit:+ with $fit}"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # what torchrun chooses, with a warning
    exec python -m torch.distributed.run --standalone --nproc_per_node="$gpus" train_gpt2.py "$@" $fit
fi
model=$([[ "$preset" != tiny ]] || echo " the tiny model")
if [[ "$gpus" == 0 ]]; then say "no GPU: training$model on this CPU"; else say "training$model on one GPU"; fi
if [[ -z "$files$resume" && "$preset" == tiny ]] && ! compgen -G 'data/text/text_train_*.bin' >/dev/null; then
    say "preparing text to train on: Python's own sources"
    python data/text.py
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# tee goes on after Ctrl-C, as the script does; names of folders are read from what it prints.
PYTHONIOENCODING=utf-8 python train_gpt2.py "$@" | tee -i "$log"
run=$(sed -n 's/.*all of it in \(.*\)/\1/p; s/.*is finished: \(.*\)\/model.pt.*/\1/p' "$log" | tail -1)
prompt="def "  # the start of Python, which is what it learned unless other text was given
[[ -z "$files$resume" ]] && grep -qs "Python's own sources" data/text/text_inputs.json || prompt=""
say "a sample of what it learned"
python evals/sample.py "$run" --prompt "$prompt" --tokens 300
printf -v shown %q "$run"
if python -c 'import matplotlib' 2>/dev/null && python records/report.py plot "$run/loss.png" "$run" >/dev/null; then
    say "its loss over time and tokens: $shown/loss.png"
else
    say "a picture of its loss: pip install matplotlib; python records/report.py plot loss.png $shown"
fi
say "next: ${first}python evals/sample.py $shown --prompt TEXT"
say "      python data/text.py YOUR-TEXT --out data/mine"
say "      pip install safetensors; python evals/export.py $shown"
