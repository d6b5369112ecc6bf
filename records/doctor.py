"""Is this machine ready? A few checks that save money, one line each: ok, or mend with what mends it.

    ./run.sh doctor                                # what ./run.sh would run here
    python records/doctor.py --preset gpt2         # another recipe; options are those of train_gpt2.py

On a machine without a GPU that is `tiny`, and a line says what more a GPU needs. Exit status 1 if there is
anything to mend.
"""

import glob
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
# Before the files of a command, unless the current folder, where shards are looked for, is the repository.
BASE = "" if os.path.samefile(".", HERE.parent) else shlex.quote(f"{HERE.parent}/")
INSTALL = f"python -m pip install -r {BASE}requirements.txt"
FINEWEB = f"python {BASE}data/fineweb.py 10" + " --out data/fineweb10B" * bool(BASE)
try:
    import timing
    import torch

    import train_gpt2
except Exception as error:  # noqa: BLE001 - a missing package, a Python that is too old
    sys.exit(f"mend software: Python {sys.version.split()[0]} cannot import the trainer: {error}; with Python 3.10 "
             f"or newer: {INSTALL}")
from train_gpt2 import Config, Processes, UserError, preset_values

GIB = 2**30
MADE = {Config.train_files: f"{BASE or './'}run.sh fetches it, 200 MB a shard: {FINEWEB}",
        preset_values("tiny")["train_files"]: f"{BASE or './'}run.sh makes it of Python's sources: "
        f"python {BASE}data/text.py" + " --out data/text" * bool(BASE)}


def relative_error(found, expected):
    found, expected = (part.detach().double().cpu() for part in (found, expected))
    return float((found - expected).norm() / expected.norm())


def needs_mending(is_bad, text):
    if is_bad:
        raise UserError(text)
    return text


# In: the config, and how many GPUs torch sees. Out: what was found. Each raises UserError, or anything
# else, for what must be mended.


def software(config, gpus):
    pins = (HERE.parent / "requirements.txt").read_text(encoding="utf-8")
    wanted, found = pins.split("torch==")[1].split()[0], torch.__version__.split("+")[0]
    tried = found.startswith(("2.11.", "2.12.", "2.13."))
    return needs_mending(not tried, f"Python {sys.version.split()[0]}, torch {torch.__version__}, pinned is {wanted}"
                         + f": {INSTALL}" * (not tried))


def graphics(config, gpus):
    listed = subprocess.getoutput("nvidia-smi -L").count("GPU ") if shutil.which("nvidia-smi") else 0
    if listed == gpus == 0 or config.device == "cpu":
        full = Config(dtype="bfloat16")
        need = timing.needed_memory(full, timing.model_sizes(full, 50257), 1) / GIB
        small = config.preset == "tiny"
        return needs_mending(not small, f"none is used; --preset {config.preset} "
                             f"{'trains' if small else 'takes days to months'} on this CPU; gpt2 needs NVIDIA GPUs, a "
                             f"driver for CUDA 13, and {need:.0f} GiB on one GPU, less with other settings "
                             "(records/timing.py)")
    sees = torch.cuda.device_count()
    needs_mending(sees < listed, f"the driver lists {listed} GPUs, torch {torch.__version__} sees {sees}: unset "
                  "CUDA_VISIBLE_DEVICES, or install a torch for this driver")
    torch.cuda.init()  # raises where they are listed, but cannot be used
    return f"{gpus} x {torch.cuda.get_device_name()}"


def memory(config, gpus):
    """And whether so many processes can share the rows of a step."""
    config = train_gpt2.for_device(config, Processes(0, max(1, gpus), torch.device("cuda" if gpus else "cpu")))[0]
    if not gpus:
        return f"not predicted on a CPU; activations in {config.dtype}"
    sizes = timing.model_sizes(config, timing.vocabulary_of(config)[0])
    capacity = min(torch.cuda.mem_get_info(number)[0] for number in range(gpus))  # free, whoever has the rest
    changes = timing.settings_that_fit(config, sizes, gpus, capacity)
    return needs_mending(changes is None, timing.fit_line(config, sizes, gpus, capacity, changes))


def data(config, gpus):
    if config.train_files in MADE and not glob.glob(config.train_files):
        fetched = gpus or config.preset == "tiny"  # by run.sh
        return needs_mending(not fetched, f"none yet: {MADE[config.train_files]}" if fetched else
                             f"none: {FINEWEB}")
    found = train_gpt2.open_data(config)
    return f"{found.train.tokens:,} training tokens, {found.val.tokens:,} for validation, enough for the run"


def disk(config, gpus):
    out = Path(config.out).absolute()
    folder = next(parent for parent in (out, *out.parents) if parent.exists())
    tempfile.TemporaryFile(dir=folder).close()
    config = replace(config, dtype="bfloat16" if config.dtype == "auto" else config.dtype)
    sizes = timing.predicted_memory(config, timing.model_sizes(config, timing.vocabulary_of(config)[0]), 1)
    need = (sizes["weights"] + sizes["optimizer"]) * (config.keep + 1 if config.save_every else 1) / GIB
    free = shutil.disk_usage(folder).free / GIB
    return needs_mending(free < need, f"{free:.1f} GiB free in {folder}, a run writes up to {need:.1f}"
                         + "; make room, or name another place with --out" * (free < need))


def attention(config, gpus):
    """Output and gradients, where there is a GPU those of FlexAttention, against a dense softmax."""
    draw, window = torch.Generator().manual_seed(0), 200
    starts, dtype = torch.rand(2, 1024, generator=draw) < 0.01, torch.bfloat16 if gpus else torch.float32
    parts = [torch.randn(2, 2, 1024, config.width // config.heads, generator=draw) for _ in range(4)]
    parts[0] *= parts[0].shape[-1] ** -0.5
    place, document = torch.arange(1024), starts.cumsum(1)
    seen = (place[:, None] >= place) & (place[:, None] - place <= window)
    seen = seen & (document[:, :, None] == document[:, None])
    exact = [part.clone().requires_grad_() for part in parts[:3]]
    moved = [part.to("cuda" if gpus else "cpu", dtype, copy=True).requires_grad_() for part in parts[:3]]
    expected = (exact[0] @ exact[1].mT).masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ exact[2]
    first_key = train_gpt2.first_visible_key(train_gpt2.document_starts(starts.to(moved[0].device)), window)
    config = replace(config, dtype=str(dtype).removeprefix("torch."))
    mask = train_gpt2.block_mask(first_key, train_gpt2.block_size(config)) if gpus else train_gpt2.span_mask(first_key)
    found = train_gpt2.compiled_if(gpus > 0, train_gpt2.attention)(*moved, mask, config.attention_kernel)
    for output in (expected, found):
        output.backward(parts[3].to(output))
    pairs = [(found, expected), *((one.grad, other.grad) for one, other in zip(moved, exact, strict=True))]
    worst = max((relative_error(*pair) for pair in pairs), key=lambda error: (math.isnan(error), error))
    return needs_mending(not worst < 0.02, f"off by {worst:.1e} from a dense softmax, at most 2e-02")


def float8_head(config, gpus):
    """Loss and gradients, against products in bfloat16."""
    draw, device, results = torch.Generator().manual_seed(0), "cuda" if gpus else "cpu", []
    hidden = torch.randn(512, config.width, generator=draw).to(device, torch.bfloat16)
    head = (config.width**-0.5 * torch.randn(1024, config.width, generator=draw)).to(device)
    targets = torch.randint(-1, 1024, (512, 1), generator=draw).to(device)
    for float8 in (False, True):
        model = SimpleNamespace(float8=float8, config=config, **{
            name: train_gpt2.compiled_if(gpus > 0, function) for name, function in (
                ("run_quantised", train_gpt2.quantised), ("run_losses", train_gpt2.chunk_losses),
                ("run_gradient", train_gpt2.chunk_gradient))})
        leaves = [part.clone().requires_grad_() for part in (hidden, head)]
        loss, _ = train_gpt2.ChunkedLoss.apply(*leaves, targets, [torch.ones(())], model)
        loss.backward()
        results.append((loss, *(leaf.grad for leaf in leaves)))
    loss, *gradients = map(relative_error, results[1], results[0])
    good = loss < 0.01 and all(error < 0.15 for error in gradients)
    return needs_mending(not good, f"loss off by {loss:.1e}, gradients by {max(gradients):.1e}, at most 1e-02 and "
                         "1.5e-01" + "; give --head-dtype wide" * (not good))


def exchange_one(rank, world, folder, on_gpu):
    """One process of an all-reduce."""
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world,
        device_id=device if on_gpu else None, timeout=timedelta(seconds=60))
    ones = torch.ones(2**24, device=device)
    torch.distributed.all_reduce(ones)
    if not bool((ones == world).all()):
        raise ArithmeticError(f"the sum of {world} ones is {ones[0].item()}")
    torch.distributed.destroy_process_group()


def exchange(config, gpus):
    with tempfile.TemporaryDirectory() as folder:
        world = gpus or 2
        torch.multiprocessing.spawn(exchange_one, (world, folder, gpus > 0), world)
    return f"all-reduce over {world} processes"


def main(arguments=None):
    """The command line. Returns the exit status. Raises UserError for bad options."""
    words, bad = list(sys.argv[1:] if arguments is None else arguments), 0
    if {"-h", "--help"} & {*words}:
        print(__doc__)
    if not torch.cuda.device_count() and not any(word.startswith(("--preset", "--resume")) for word in words):
        words += ["--preset", "tiny"]  # as run.sh does
    config = train_gpt2.parse_command_line(words)
    gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
    gpus = min(1, gpus) if config.preset == "tiny" else gpus  # as run.sh does
    has_float8 = gpus and config.head_dtype != "wide" and torch.cuda.get_device_capability() >= (8, 9)
    for check in (software, graphics, memory, data, disk, attention, *[float8_head] * has_float8,
                  *[exchange] * (gpus > 1)):
        try:
            print(f"ok   {check.__name__}: {check(config, gpus)}", flush=True)
        except (Exception, UserError) as error:  # noqa: BLE001
            bad += 1
            what = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            print(f"mend {check.__name__}: {what}{' '.join(str(error).split())[-400:]}", flush=True)
    print("ready to train" if not bad else f"{bad} to mend")
    return int(bad > 0)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    if sys.stdout:  # None where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
