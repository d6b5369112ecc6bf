"""Is this machine ready? Each check is one line: ok, note, or mend with the command that mends it.

    ./run.sh doctor                                # what ./run.sh would run here
    python records/doctor.py --preset gpt2         # another recipe; options are those of train_gpt2.py

Exit status 0 where nothing must be mended, else 1.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
try:
    import timing
    import torch

    import train_gpt2
except Exception as error:  # a missing package, a Python that is too old
    sys.exit(f"mend  software: Python {sys.version.split()[0]} cannot import the trainer: {error}; with Python 3.10 or "
             "newer: python -m pip install -r requirements.txt")

GIB = 2**30
found = []


def say(verdict, what, text):
    found.append(verdict)
    print(f"{verdict:5} {what}: {text}")


def check_software():
    wanted = (HERE.parent / "requirements.txt").read_text().split("torch==")[1].split()[0]
    verdict = "ok" if torch.__version__.startswith(wanted) else "note"
    say(verdict, "software", f"Python {sys.version.split()[0]}, torch {torch.__version__} (requirements.txt has {wanted})")


def check_gpus(on_gpu):
    if not on_gpu:
        say("note", "GPU", "none that torch can use: ./run.sh trains `tiny` on the CPU; gpt2 needs NVIDIA GPUs with a "
                           "driver for CUDA 13")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        say("ok", f"GPU {number}", f"{properties.name}, {properties.total_memory / GIB:.1f} GiB, capability "
                                   f"{properties.major}.{properties.minor}")
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=clocks_event_reasons.active,driver_version", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True)
        say("ok" if told.returncode == 0 else "note", "driver", " / ".join(told.stdout.split("\n")).strip(" /") or told.stderr[:80])


def check_config(config, world):
    try:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        train_gpt2.for_device(config, train_gpt2.Processes(0, world, device))
        say("ok", "settings", f"--preset {config.preset}, {world} process(es)")
    except train_gpt2.UserError as error:
        say("mend", "settings", str(error))


def check_data(config, on_gpu):
    try:
        data = train_gpt2.open_data(config)
        say("ok", "data", f"{data.train.tokens:,} training tokens, {data.val.tokens:,} validation tokens")
    except train_gpt2.UserError as error:
        by_itself = config.train_files in (train_gpt2.Config.train_files, train_gpt2.preset_values("tiny")["train_files"])
        missing = str(error).startswith("no shard")
        say("note" if missing and by_itself else "mend", "data",
            "./run.sh fetches or makes it" if missing and by_itself else str(error))


def check_disk(config, on_gpu):
    folder = Path(config.out)
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free / GIB, 20 if on_gpu else 2
    say("ok" if free > needed else "mend", "disk", f"{free:.0f} GiB free at {folder.resolve()}, {needed} are enough")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        say("mend", "disk", f"cannot write to {folder}: {error.strerror}; give another --out")


def check_attention():
    """FlexAttention and the float8 head on the GPU against the CPU."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 512, 64, generator=generator) for _ in range(3))
    starts = torch.rand(1, 512, generator=generator) < 0.01
    first_key = train_gpt2.first_visible_key(starts, 200)
    expected = train_gpt2.attention(query, key, value, train_gpt2.span_mask(first_key))
    mask, parts = train_gpt2.block_mask(first_key.cuda()), [part.cuda().bfloat16() for part in (query, key, value)]
    attention = torch.compile(train_gpt2.attention, dynamic=False)
    error = (attention(*parts, mask).float().cpu() - expected).abs().max().item()
    say("ok" if error < 0.05 else "mend", "attention", f"largest error on the GPU {error:.4f}, below 0.05 expected")
    if torch.cuda.get_device_capability() >= (8, 9):
        kind = torch.float8_e4m3fn
        a, b = (train_gpt2.to_float8(x[0, 0].cuda(), 0.02, kind) for x in (query, key))
        product = train_gpt2.float8_product(a, b, 4e-4, torch.bfloat16).float().cpu()
        error = (product - query[0, 0] @ key[0, 0].T).abs().max().item() / product.abs().max().item()
        say("ok" if error < 0.1 else "mend", "float8", f"largest relative error of a product {error:.3f}, below 0.1 expected")


def check_exchange(count):
    """All-reduce over the GPUs, in processes of their own."""
    code = ("import os, torch, torch.distributed as d; r = int(os.environ['LOCAL_RANK']); torch.cuda.set_device(r); "
            "d.init_process_group('nccl', device_id=torch.device('cuda', r)); x = torch.ones(1 << 24, device='cuda'); "
            "d.all_reduce(x); assert x[0] == d.get_world_size(); d.destroy_process_group()")
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(code)
        file.flush()
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", file.name]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=180)
            failed = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        except subprocess.TimeoutExpired:
            failed = ["no answer within 180 s"]
    say("mend" if failed else "ok", "exchange", f"all-reduce over {count} GPUs" + "".join(f" fails: {line}" for line in failed))


def main(arguments=None):
    words = list(sys.argv[1:] if arguments is None else arguments)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not any(word.startswith(("--preset", "--resume")) for word in words):
        words += ["--preset", "tiny"]  # as run.sh does
    config = train_gpt2.parse_command_line(words)
    check_software()
    check_gpus(on_gpu)
    check_config(config, torch.cuda.device_count() if on_gpu and config.preset != "tiny" else 1)
    check_data(config, on_gpu)
    check_disk(config, on_gpu)
    if on_gpu:
        timing.main(["--fit", *words])
        check_attention()
        if torch.cuda.device_count() > 1:
            check_exchange(torch.cuda.device_count())
    else:
        say("ok", "processor", f"{os.cpu_count()} cores, bfloat16 {torch.cpu._is_avx512_bf16_supported()}")
    print("mend first what says so" if "mend" in found else "ready")
    return 1 if "mend" in found else 0


if __name__ == "__main__":
    sys.exit(main())
