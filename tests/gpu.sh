#!/usr/bin/env bash
# What only a GPU can show, in one command: step times, kernels, short runs, tests. It installs nothing.
#
#   tests/gpu.sh [--corpus DIR] [--out DIR] [--only STEP,...] [--peers DIR] [--patience N] [--device cpu]
#
#   --corpus    shards *_train_*.bin and *_val_*.bin; without, times are those of made-up tokens and nothing is trained
#   --out       where logs and the table go (default logs/gpu-DATE)
#   --only      some of: compile, time-five-minute, time-gpt2, kernels, libraries (the last stage with flash-attn-4,
#               where it is installed), train-five-minute, train-gpt2, tests, peers
#   --peers     files *.args, each with options of records/bench.py, one a line, as seen from that folder
#   --patience  limits times N: all of it takes eight minutes at most (ten more for each comparison)
#   --device    cpu: the same steps in small, to try this script
#
# Each step has a limit and a log of its own; what fails hides nothing of the rest, but for the last steps when time is
# up. Exit status 1 if a step has failed.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
corpus="" out="" only="" peers="" patience=1 device=cuda

refuse() { echo "gpu.sh: $*" >&2; exit 2; }

while [[ $# -gt 0 ]]; do
    case "$1" in
    --corpus | --out | --only | --peers | --patience | --device)
        [[ $# -ge 2 && -n "$2" ]] || refuse "$1 needs a value (tests/gpu.sh --help)"
        printf -v "${1#--}" %s "$2"
        shift 2 ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) refuse "unknown option $1; expected --corpus, --out, --only, --peers, --patience or --device" ;;
    esac
done
[[ "$device" == cuda || "$device" == cpu ]] || refuse "--device $device is not one of cuda, cpu; give --device cpu"
[[ "$patience" =~ ^[0-9]*\.?[0-9]+$ ]] || refuse "--patience $patience is not a number; for example --patience 2"
for folder in "$corpus" "$peers"; do
    [[ -z "$folder" || -d "$folder" ]] || refuse "$folder is no folder; give one that exists with --corpus or --peers"
done
python=python3  # the environment that is active, else .venv as run.sh makes it, else what the machine has
if [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then python=python; elif [[ -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
fi
found=$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) ||
    refuse "$python cannot import torch; activate an environment that has it, or run ./run.sh doctor"
[[ "$device" == cpu || "$found" -gt 0 ]] || refuse "torch sees no GPU; ./run.sh doctor tells why; or give --device cpu"
out=${out:-$root/logs/gpu-$(date +%Y%m%d-%H%M%S)}
mkdir -p "$out" 2>/dev/null || refuse "cannot make $out; name a writable place with --out DIR"
out=$(cd "$out" && pwd) corpus=${corpus:+$(cd "$corpus" && pwd)} peers=${peers:+$(cd "$peers" && pwd)}
cd "$root" || exit

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$scratch/cache TRITON_CACHE_DIR=$scratch/triton  # empty: the first to compile is cold
{ date; "$python" -c 'import sys, torch; print(sys.version, torch.__version__, torch.version.cuda)'
  nvidia-smi; git log -1 --format=%H; } >"$out/machine.txt" 2>&1 || true

launch=("$python") parallel=() data=() sizes=() tests=(-m gpu tests)
run=(--steps 24 --val-every 8 --val-tokens 1048576 --long-documents continue)  # shards may be few
for count in 2 4 8; do  # as many as can share the rows of a step
    [[ "$found" -lt $count ]] || launch=("$python" -m torch.distributed.run --standalone --nproc_per_node="$count")
done
if [[ "$device" == cpu ]]; then
    launch=("$python") tests=(-m "not gpu" -k layouts tests/test_gpu.py)
    run=(--steps 8 --val-every 4 --val-tokens 512 --long-documents continue)
    sizes=(--device cpu --dtype float32 --width 32 --heads 2 --tokens-per-step 512 --row-tokens 128 --val-row-tokens 128
           --window 64 --window-short 32 --loss-chunk 128)
elif "$python" -c 'import xdist' 2>/dev/null; then
    parallel=(-n 4)  # compiling keeps processors busy, not the GPU
fi
[[ -z "$corpus" ]] || data=(--train-files "$corpus/*_train_*.bin" --val-files "$corpus/*_val_*.bin")
[[ -z "$corpus" || -f "$corpus/prefixes.bin" ]] || data+=(--prefix-weight 0)  # data/fineweb.py makes the table

rows=() failed=0
step() {  # name, limit in seconds, how sed finds its figures in the log, command
    local name=$1 limit=$2 figures=$3 log=$out/$1.log begin=$SECONDS state=ok status
    shift 3
    [[ -z "$only" || ",$only," == *",${name/peers-*/peers},"* ]] || return 0
    limit=$(awk -v name="$name" "BEGIN { limit = $limit * $patience; left = 480 * $patience - $SECONDS
        print (name ~ /^peers/ || limit < left) ? limit : (left > 1 ? left : 1) }")
    echo "==> $name, at most $limit s"
    timeout --kill-after=20 "$limit" "$@" >"$log" 2>&1
    status=$?
    case $status in 0) ;; 124 | 137) state=TIMEOUT failed=1 ;; *) state=FAILED failed=1 ;; esac
    rows+=("$(printf '%-18s %-8s %4d  %s' "$name" $state $((SECONDS - begin)) \
        "$(sed -nE "$figures" "$log" | tr -s ' ' | paste -sd';' | cut -c1-150)")")
    [[ $state == ok ]] || rows+=("$(printf '%-34s%s' "" "see $log: $(tail -n 1 "$log" | cut -c1-400)")")
}
times='s/^(compiled in [0-9.]+ s|ms\/step .*)$/\1/p'
verdict='s/^verdict: (.*)/\1/p'

# Both recipes compile side by side, and gpt2's stages, which takes processors and not the card: recomputation has the
# same kernels and needs less memory. Then what is timed has the card to itself, and finds them on disk.
timing=("${launch[@]}" records/timing.py "${sizes[@]}" "${data[@]}")
step compile 200 "$times" bash -c 'for stages in 0 1 2,3; do
        "$@" --timed-steps 0 --recompute true --stages $stages & jobs+=($!)
    done
    "$@" --timed-steps 0 --recompute true --preset five-minute; status=$?
    for job in "${jobs[@]}"; do wait $job || status=1; done; exit $status' compile "${timing[@]}"
step time-five-minute 60 "$times" "${timing[@]}" --preset five-minute --json "$out/five-minute.json"
step time-gpt2 90 "$times" "${timing[@]}" --json "$out/gpt2.json"
step kernels 60 's/^(idle .*%|matrix .*|attention .*).*/\1/p' "$python" records/kernels.py "${sizes[@]}" "${data[@]}"
if "$python" -c 'import flash_attn.cute, quack' 2>/dev/null; then
    step libraries 150 "$times" "${timing[@]}" --stages 2 --attention-kernel flash --mlp-kernel quack \
        --json "$out/libraries.json"
fi
for preset in five-minute gpt2; do
    if [[ -n "$corpus" ]]; then
        step train-$preset 80 's/.* val_loss:([0-9.naif]+) train_time:([0-9]+)ms.*/\1 at \2 ms/p' \
            "${launch[@]}" train_gpt2.py --preset $preset "${sizes[@]}" "${data[@]}" "${run[@]}" --repeat true \
            --out "$scratch/$preset"
        cp "$scratch/$preset"/*/log.txt "$out/$preset.txt" 2>/dev/null
        cp "$scratch/$preset"/*/metrics.jsonl "$out/$preset.jsonl" 2>/dev/null
    elif [[ -z "$only" || ",$only," == *,train-$preset,* ]]; then
        rows+=("$(printf '%-18s %-8s %4s  %s' "train-$preset" skipped "" "no --corpus")")
    fi
done
step tests 300 's/^=* ?([0-9].*(passed|failed|error|skipped).*) in .*/\1/p' \
    "$python" -m pytest -v -rs --tb=short -p no:cacheprovider ${parallel[@]+"${parallel[@]}"} "${tests[@]}"
for file in ${peers:+"$peers"/*.args}; do
    mapfile -t arguments <"$file"
    step "peers-$(basename "$file" .args)" 600 "$verdict" env -C "$peers" "$python" "$root/records/bench.py" \
        "${arguments[@]}" --corpus "$corpus" --json "$out/$(basename "$file" .args).json"
done

[[ ${#rows[@]} -gt 0 ]] || refuse "--only $only names no step; tests/gpu.sh --help lists them"
{
    printf '\n%-18s %-8s %4s  %s\n' step state s figures
    printf '%s\n' "${rows[@]}" "logs in $out"
} | tee "$out/table.txt"
exit $failed
