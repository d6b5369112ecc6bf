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
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }

# An environment that is active is used as it is given; without one, .venv is made beside this file.
if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
    if [[ ! -x .venv/bin/python ]]; then
        say "making the Python environment .venv"
        python3 -m venv .venv
    fi
    source .venv/bin/activate
fi

install() {  # only what is missing, so that a second run starts at once
    if ! python - "$1" <<'PYTHON'
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
    then
        say "installing $1"
        python -m pip install --quiet --disable-pip-version-check -r "$1"
    fi
}

install requirements.txt
command=train
case "${1:-}" in
test)
    shift
    install requirements-dev.txt
    say "running the tests"
    [[ $# -eq 0 ]] || exec python -m pytest "$@"
    heavy=(tests/test_{checkpoint,processes,command_line,data_scripts}.py)  # beside the others, on another core
    output=$(mktemp)
    python -m pytest -q "${heavy[@]}" >"$output" 2>&1 &
    status=0
    python -m pytest -q tests "${heavy[@]/#/--ignore=}" || status=1
    wait $! || status=1
    cat "$output" && rm -f "$output"
    exit $status
    ;;
check)
    say "comparing 20 small steps with the stored losses"
    exec python records/check.py
    ;;
doctor)
    shift
    command=doctor
    ;;
-h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' run.sh
    exec python train_gpt2.py --help
    ;;
"" | --*) ;;
*)
    echo "run.sh: unknown command $1; expected test, check, doctor, or options of train_gpt2.py (./run.sh --help)" >&2
    exit 2
    ;;
esac

if [[ "$PWD" != "$from" && $# -gt 0 ]]; then  # relative files are meant from where the user stands
    previous="" arguments=()
    for word in "$@"; do
        case "$previous $word" in
        "--resume none" | "--resume auto") ;;
        "--train"[-_]"files "* | "--val"[-_]"files "* | "--out "* | "--resume "*)
            [[ "$word" == /* ]] || word=$from/$word
            ;;
        *" --resume=none" | *" --resume=auto") ;;
        *" --train"[-_]"files="[!/]* | *" --val"[-_]"files="[!/]* | *" --out="[!/]* | *" --resume="[!/]*)
            word=${word%%=*}=$from/${word#*=}
            ;;
        esac
        arguments+=("$word")
        previous=$word
    done
    set -- "${arguments[@]}"
fi

[[ "$command" == train ]] || exec python records/doctor.py "$@"

resumes=false  # a run whose settings and files its checkpoint knows
[[ ! " $* " =~ \ --resume[\ =][^\ ]*[/.] ]] || resumes=true
small=true  # whether it is tiny that trains, and on which text
[[ " $* " != *" --preset"* || " $* " == *" --preset tiny "* || " $* " == *" --preset=tiny "* ]] || small=false
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
if [[ "$gpus" -gt 0 && -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then  # which may hide some
    gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true)
fi
if [[ "$gpus" -gt 0 ]]; then
    [[ " $* " == *" --preset"* ]] || small=false
    if [[ "$small" == false && "$resumes" == false && " $* " != *" --train"[-_]"files"* ]]; then
        shards=10
        [[ ! " $* " =~ \ --preset[\ =]gpt2-medium\  ]] || shards=20
        [[ ! " $* " =~ \ --preset[\ =]gpt2-xl\  ]] || shards=80
        say "fetching FineWeb where it is missing (validation and $shards training shards of 200 MB)"
        python data/fineweb.py "$shards"
    fi
    if [[ "$small" == false ]]; then
        fit=$(python records/timing.py --fit "$@")  # settings that make it fit into these GPUs
        say "training on $gpus GPU(s) ${fit:+with $fit}"
        exec python -m torch.distributed.run --standalone --nproc_per_node="$gpus" train_gpt2.py "$@" $fit
    fi
    say "training the tiny model on one GPU"
elif [[ "$small" == true ]]; then
    say "no GPU: training the tiny model on this CPU"
else
    say "no GPU: training on this CPU"
fi
if [[ "$small" == true && "$resumes" == false ]] && ! compgen -G 'data/text/text_train_*.bin' >/dev/null; then
    say "preparing text to train on: Python's own sources"
    python data/text.py
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
[[ " $* " == *" --preset"* || "$resumes" == true ]] || set -- --preset tiny "$@"
python train_gpt2.py "$@" | tee -i "$log"  # which goes on after Ctrl-C, as the script does
run=$(sed -n 's/.*all of it in \([^;]*\).*/\1/p; s/.*is finished: \(.*\)\/model.pt.*/\1/p' "$log" | tail -1)
prompt="def "  # the start of Python, which is what it learned unless other text was given
[[ " $* " != *" --train"[-_]"files"* && "$resumes" == false ]] || prompt=""
say "a sample of what it learned"
python evals/sample.py "$run" --prompt "$prompt" --tokens 300
say "more: python evals/sample.py $run --prompt TEXT"
