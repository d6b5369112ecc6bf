"""Is this machine ready for a run? Ten checks before money is spent.

    ./run.sh doctor                                            # for the hundred-second recipe, on all GPUs
    python records/doctor.py --preset tiny                     # for the small model on a CPU

Options are those of train_gpt2.py, whose shards, folder and sizes are looked at. One line per check: `ok` with what was
found, `mend` with what was found and what to do, `skipped` with the reason. Each check runs in a process of its own, so
that one that fails, crashes or hangs hides nothing of the others. Exit status 0 if there is nothing to mend.
"""

import contextlib
import glob
import importlib.util
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
INSTALL = "python -m pip install -r requirements.txt"
try:
    import torch
    from timing import MIB, best_of, doubled, free_memory, predicted_memory, vocabulary_of
    from train_gpt2 import (GPT2_VOCABULARY, HEAD_UNIT, PRESETS, Config, Processes, Refusal, attend, block_mask,
                            check_processes, compute_dtype, first_visible_key, float8, float8_head, loss_of_chunk,
                            open_data, parse_command_line, read_tokens, span_mask)
except Exception as broken:  # a missing or damaged package, a Python that is too old
    sys.exit(f"mend     software: Python {sys.version.split()[0]} cannot import the trainer: "
             f"{' '.join(str(broken).split())}; with Python 3.10 or newer: {INSTALL}")

GIB, KNOWN_TORCH = 2**30, ("2.11", "2.12", "2.13")
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}  # by CUDA's major version, as NVIDIA lists them for Linux
EXPECTED_BANDWIDTH = 100.0  # GB/s between GPUs joined by NVLink
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 0.002, torch.float64: 0.002}  # of the norm; a wrong mask: 0.1 or more
FLOAT8_TOLERANCE = (0.01, 0.15)  # loss, gradients, whose slopes have two bits after the leading one
HOT, SHARED_MEMORY, OPEN_FILES, CACHE_SIZE = 85, GIB, 1024, 100 * MIB  # CACHE_SIZE: compiled graphs of a process, about
QUERY = ("--query-gpu=index,temperature.gpu,clocks.sm,clocks.max.sm,power.limit,power.default_limit,"
         "clocks_event_reasons.active,ecc.errors.uncorrected.volatile.total,memory.used,memory.total")
REASONS = {  # bits of the driver's answer that slow a GPU down; 1 is idle
    0x2 | 0x10 | 0x100: "has clocks that were set: sudo nvidia-smi -i {0} -rgc && sudo nvidia-smi -i {0} -rac",
    0x4: "is held back by its power limit: end what runs there, or sudo nvidia-smi -i {0} -pl WATTS",
    0x20 | 0x40: "is slowed down by heat: look at the cooling",
    0x8 | 0x80: "is slowed down by its hardware: look at power supply and cooling"}
Finding = tuple[str, str]  # ok, mend or skipped; what to say


def found(text: str, *problems) -> Finding:
    """What a check saw, or, where some are not empty, the problems."""
    bad = "; and ".join(filter(None, problems))
    return ("mend", bad) if bad else ("ok", text)


def run(command: str) -> str | None:
    """What a program prints; None where it is not installed. Raises RuntimeError with what a failing one says."""
    if shutil.which(command.split()[0]) is None:
        return None
    ended = subprocess.run(command.split(), check=False, capture_output=True, text=True, timeout=20)
    if ended.returncode:
        raise RuntimeError(f"{command.split(' --format')[0]} says: {' '.join((ended.stdout + ended.stderr).split())}")
    return ended.stdout


def table(query: str) -> list[list[str]]:
    """Rows and cells that nvidia-smi gives; none without it."""
    try:
        lines = (run(f"nvidia-smi {query} --format=csv,noheader,nounits") or "").splitlines()
    except RuntimeError as error:
        older = query.replace("clocks_event_reasons", "clocks_throttle_reasons")  # their name in older drivers
        if older == query or "not a valid field" not in str(error):
            raise
        return table(older)
    return [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]


def number(text: str) -> float:
    try:
        return float(int(text, 16) if text.startswith("0x") else text)
    except ValueError:  # [N/A]
        return math.nan


def sizes(config: Config, gpus: int, world: int) -> dict[str, int]:
    """Bytes of one of `world` processes, by what they are for, from shapes alone."""
    device, vocabulary = torch.device("cuda" if gpus else "cpu"), GPT2_VOCABULARY
    with contextlib.suppress(Refusal):  # a damaged shard, which another check names
        vocabulary, _ = vocabulary_of(config)
    return predicted_memory(config, vocabulary, compute_dtype(config, device), world, device)


def is_compiled(config: Config, gpus: int) -> bool:
    return gpus > 0 and config.compile == "auto" and importlib.util.find_spec("triton") is not None


def relative_error(numbers: torch.Tensor, reference: torch.Tensor) -> float:
    numbers, reference = numbers.detach().double(), reference.detach().double()
    return float((numbers - reference).norm() / reference.norm())


# The checks, in the order of their lines. In: the configuration, and how many GPUs torch would train on. Each may raise
# Refusal instead of returning what is to mend.


def software(config: Config, gpus: int) -> Finding:
    lines = (HERE.parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("#")[0].strip().split("==") for line in lines if "==" in line)
    there = {name: next((d.version.partition("+")[0] for d in distributions(name=name)), "missing") for name in pins}
    wrong = [name for name in pins if there[name] != pins[name]]
    if there["torch"].rpartition(".")[0] in KNOWN_TORCH and "torch" in wrong:
        wrong.remove("torch")
        there["torch"] += f" (pinned is {pins['torch']}; {', '.join(KNOWN_TORCH)} work)"
    text = f"Python {sys.version.split()[0]}, " + ", ".join(f"{name} {there[name]}" for name in pins)
    problems = [f"{name} is {there[name]}, expected {pins[name]}: {INSTALL}" for name in wrong]
    with contextlib.suppress(RuntimeError):  # which the next check says
        for driver, in table("--query-gpu=driver_version")[:config.device != "cpu"]:
            cuda = torch.version.cuda or "none"
            oldest, text = OLDEST_DRIVER.get(cuda.split(".")[0], 0), f"{text}, CUDA {cuda} with driver {driver}"
            problems += [cuda == "none" and f"torch has no CUDA, though there is a driver: {INSTALL} --force-reinstall",
                         number(driver.split(".")[0]) < oldest and f"driver {driver} is too old for the CUDA {cuda} of "
                         f"torch: install driver {oldest} or newer, or a torch for an older CUDA"]
    return found(text, *problems)


def visible_gpus(config: Config, gpus: int) -> Finding:
    if config.device == "cpu":
        return "skipped", "--device cpu"
    listed, chosen = run("nvidia-smi -L"), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [line.split("(")[0].split(":", 1)[1].strip() for line in (listed or "").splitlines() if line[:3] == "GPU"]
    if not gpus and not names:
        if listed is None and config.preset == "tiny" and config.device == "auto":
            return "ok", "none, and no NVIDIA driver: tiny trains on this CPU"
        what = "no NVIDIA driver (nvidia-smi is missing)" if listed is None else "the NVIDIA driver lists no GPU"
        return "mend", f"{what}: install the driver, or take a machine with GPUs; --device cpu does without"
    kinds = f"{max(len(names), gpus)} x {' / '.join(sorted(set(names))) or 'GPU'}"
    if gpus < len(names) and chosen is not None:
        return "mend", (f"CUDA_VISIBLE_DEVICES={chosen} hides {len(names) - gpus} of {kinds}: unset it"
                        + f", or start with --nproc_per_node={gpus}" * (gpus > 0))
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return "mend", (f"torch cannot use the {kinds} that the driver lists: {' '.join(str(error).split())}; "
                        "mend that, or give --device cpu")
    check_processes(config, gpus)
    return found(f"{kinds}, all seen by torch", gpus < len(names) and
                 f"the driver lists {kinds}, torch sees {gpus}: restart the machine, or the container with --gpus all")


def gpu_state(config: Config, gpus: int) -> Finding:
    """Clocks, power, heat, errors and users of each GPU, while nothing of ours is on them."""
    if config.device == "cpu" or run("nvidia-smi -L") is None:
        return "skipped", "--device cpu" if config.device == "cpu" else "no NVIDIA driver"
    rows = table(QUERY)
    which, need = {}, sum(sizes(config, gpus, gpus).values()) / MIB if gpus else 0  # GPUs by problem
    for index, *cells in rows:
        heat, _, _, limit, usual, reasons, errors, used, total = map(number, cells)
        for is_bad, problem in (
                *((reasons > 0 and int(reasons) & bits, problem) for bits, problem in REASONS.items()),
                (limit < usual, f"has a power limit below {usual:.0f} W: sudo nvidia-smi -i {{0}} -pl {usual:.0f}"),
                (heat >= HOT, f"has {heat:.0f} degrees at rest: look at the cooling"),
                (errors > 0, f"had {errors:.0f} uncorrected memory error(s): sudo nvidia-smi -i {{0}} -r"),
                (used > GIB / MIB, f"has {used:.0f} MiB in use: end what runs there"),
                (need > total, f"has {total:.0f} MiB of memory, a process needs about {need:.0f}: --recompute true")):
            if is_bad:
                which.setdefault(problem, []).append(index)
    heat, clock, fastest, limit = ([number(row[column]) for row in rows] or [math.nan] for column in (1, 2, 3, 4))
    return found(f"{len(rows)} not throttled, nobody else on them; up to {max(heat):.0f} degrees, {min(clock):.0f} of "
                 f"{min(fastest):.0f} MHz; power limit {min(limit):.0f} W; a process needs about {need:.0f} MiB",
                 *(f"GPU {','.join(where)} {problem.format(','.join(where))}" for problem, where in which.items()),
                 *(f"process {pid} ({Path(name).name}) holds {used[-1]} MiB of a GPU: kill {pid}"
                   for pid, name, *used in table("--query-compute-apps=pid,process_name,used_memory")))


def exchange(rank: int, world: int, backend: str, folder: str, size: int) -> None:
    """One process of the all-reduce. The first one leaves the seconds that it takes in a file."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=world,
                                         device_id=device if backend == "nccl" else None)
    numbers = torch.ones(size // 4, device=device)
    torch.distributed.all_reduce(numbers)
    if bool((numbers != world).any()):
        raise ArithmeticError(f"the sum of {world} ones is not {world}")
    numbers.zero_()
    seconds = best_of(20, Processes(rank, world, device), lambda: torch.distributed.all_reduce(numbers))
    if rank == 0:
        Path(folder, "seconds").write_text(str(seconds))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def bandwidth(config: Config, gpus: int) -> Finding:
    """Of the bus: bytes per second, times the 2 (n - 1) / n of them that pass the link of each process."""
    if gpus == 1:
        return "skipped", "one GPU has nobody to exchange with"
    world, backend, size = (gpus, "nccl", 256 * MIB) if gpus else (2, "gloo", 4 * MIB)
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.start_processes(exchange, (world, backend, folder, size), world, start_method="fork")
        except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
            raise RuntimeError(str(error).strip().splitlines()[-1]) from None  # the last line is the process's own
        speed = 2 * (world - 1) / world * size / float(Path(folder, "seconds").read_text()) / 1e9
    text = f"{backend} all-reduce of {size // MIB} MiB, {world} processes: {speed:.2f} GB/s of bus bandwidth"
    return found(text + "; on a CPU, which says nothing of GPUs" * (not gpus), gpus and speed < EXPECTED_BANDWIDTH and
                 f"{text}, expected {EXPECTED_BANDWIDTH:.0f} by NVLink: see nvidia-smi topo -m; unset NCCL_P2P_DISABLE")


def attention(config: Config, gpus: int) -> Finding:
    """Against a dense softmax in float32 whose mask is written out: plain rows, and paired ones of twice the length."""
    device, draw, window, errors = torch.device("cuda" if gpus else "cpu"), torch.Generator().manual_seed(0), 300, []
    dtype, starts = compute_dtype(config, device), torch.rand(2, 1024, generator=draw) < 0.01
    compiled = is_compiled(config, gpus)
    for rows in (starts, doubled(starts)):
        key, document = torch.arange(rows.shape[1]), rows.long().cumsum(1)
        query = key[:, None]
        visible = (key <= query) & (query - key <= window) & (document[:, :, None] == document[:, None, :])
        shape = (2, 2, rows.shape[1], config.width // config.heads)
        drawn = [torch.randn(shape, generator=draw).to(device, dtype) for _ in range(4)]
        drawn[0] *= shape[-1] ** -0.5
        first_key = first_visible_key(rows.to(device), window)
        wide = [x.float().clone().requires_grad_() for x in drawn[:3]]
        weights = (wide[0] @ wide[1].mT).masked_fill(~visible[:, None].to(device), -math.inf).softmax(-1)
        expected = weights @ wide[2]
        expected.backward(drawn[3].float())
        for mask, has_backward in ((block_mask(first_key), compiled), (span_mask(first_key), True))[:2 - compiled]:
            leaves = [x.clone().requires_grad_(has_backward) for x in drawn[:3]]  # FlexAttention has none on a CPU
            output = (torch.compile(attend, dynamic=False, fullgraph=True) if compiled else attend)(*leaves, mask)
            errors.append(relative_error(output, expected))
            if has_backward:
                output.backward(drawn[3])
                errors += [relative_error(leaf.grad, x.grad) for leaf, x in zip(leaves, wide, strict=True)]
    text = (f"{'FlexAttention' if compiled else 'FlexAttention forward, and spans'} in {str(dtype)[6:]} off by "
            f"{max(errors):.1e} from a dense softmax, at most {TOLERANCE[dtype]}")
    is_good = all(error <= TOLERANCE[dtype] for error in errors)  # which nan is not
    return found(text, not is_good and f"{text}: {INSTALL}, or give --compile none")


def float8_products(config: Config, gpus: int) -> Finding:
    device = torch.device("cuda" if gpus else "cpu")
    is_used = float8_head(config, compute_dtype(config, device), device)  # raises Refusal if asked for in vain
    if config.head_dtype == "wide" or config.width % 16:
        return "skipped", "--head-dtype wide, or a --width that is no multiple of 16"
    if gpus and torch.cuda.get_device_capability(device) < (8, 9):
        return "skipped", f"{torch.cuda.get_device_name(device)} has no float8: its head is bfloat16"
    draw, results = torch.Generator().manual_seed(0), []
    hidden = torch.randn(512, config.width, generator=draw).to(device, torch.bfloat16)
    head = (config.width**-0.5 * torch.randn(1024, config.width, generator=draw)).to(device)
    targets = torch.randint(-1, 1024, (512, 1), generator=draw).to(device)
    narrow, chunk = float8(head, HEAD_UNIT, torch.float8_e4m3fn), loss_of_chunk
    if is_compiled(config, gpus):
        chunk = torch.compile(chunk, dynamic=False, fullgraph=True)
    for weights, turned in ((head.bfloat16(), None), (narrow, narrow.mT.contiguous())):
        results.append(chunk(hidden, weights, turned, targets, [torch.ones(())], config.softcap, True))
    loss, _, *slopes = map(relative_error, results[1], results[0])
    text = (f"the float8 head is off from bfloat16 by {loss:.1e} in its loss and {max(slopes):.1e} in its gradients, "
            "at most {} and {}".format(*FLOAT8_TOLERANCE))
    is_good = loss <= FLOAT8_TOLERANCE[0] and all(slope <= FLOAT8_TOLERANCE[1] for slope in slopes)
    return found(text + "; this run does not use it" * (not is_used), not is_good and f"{text}: give --head-dtype wide")


def data(config: Config, gpus: int) -> Finding:
    if config.train_files == PRESETS["tiny"]["train_files"] and not glob.glob(config.train_files):
        return "skipped", "no text yet: ./run.sh makes shards of Python's own sources, python data/text.py of any text"
    train, val, targets = open_data(config)
    for shard in {shard for stream in (train, val) for shard in (stream.shards[0], stream.shards[-1])}:
        for at in range(0, shard.tokens, 1 << 22):
            read_tokens(shard, at, min(1 << 22, shard.tokens - at))
    return "ok", (f"{len(train.shards)} training shard(s), {train.tokens:,} tokens, enough for {config.steps} steps"
                  f"{' with --repeat true' * config.repeat}; {len(val.shards)} validation shard(s), {targets:,} targets"
                  "; looked at: headers and sizes of all, every token of the first and the last")


def disk(config: Config, gpus: int) -> Finding:
    parts, out = sizes(config, gpus, 1), Path(config.out).absolute()
    kept = config.keep + 1 if config.save_every else 1  # one more while it is written; one if the run is told to stop
    left = {"model.pt": parts["weights"], "log": 10 * MIB, "compile caches": gpus * CACHE_SIZE,
            f"{kept} checkpoint(s)": kept * (parts["weights"] + parts["optimizer"])}
    folder, need = next(parent for parent in (out, *out.parents) if parent.exists()), sum(left.values())
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(bytes(MIB))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return "mend", f"cannot write in {folder}: {error.strerror}: name a writable place with --out FOLDER"
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free in {folder}, a run takes about {need / GIB:.2f} (" + ", ".join(
        f"{name} {size / GIB:.2f}" for name, size in left.items() if size) + ")"
    return found(text, free < need and f"{text}: make room there, or name another place with --out FOLDER")


def compiler(config: Config, gpus: int) -> Finding:
    """What torch.compile needs on a GPU, and what an earlier run has left for it."""
    if not gpus or config.compile == "none":
        return "skipped", "nothing is compiled on a CPU" if not gpus else "--compile none"
    tool = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    newest = max((path.parent for path in Path(config.out).glob("*/compile_cache_*.bin")), default=None)
    there = [rank for rank in range(gpus) if newest and (newest / f"compile_cache_{rank}.bin").exists()]
    return found(f"Triton, {tool}, compile caches for {len(there)} of {gpus} processes" + f" in {newest}" * bool(there)
                 + "; without one the first start takes minutes" * (len(there) < gpus),
                 not importlib.util.find_spec("triton") and f"Triton is missing: {INSTALL} --force-reinstall",
                 not tool and "no C compiler, which Triton needs: sudo apt-get install gcc",
                 not Path(sysconfig.get_path("include"), "Python.h").exists()
                 and "Python.h is missing, which Triton needs: sudo apt-get install python3-dev")


def host(config: Config, gpus: int) -> Finding:
    world, free = max(1, gpus), free_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts, shared = sizes(config, gpus, world), math.nan
    with contextlib.suppress(OSError):
        shared = shutil.disk_usage("/dev/shm").total
    need = world * (parts["weights"] + 3 * GIB) if gpus else sum(parts.values())  # drawn here, for GPUs too
    files, written = resource.getrlimit(resource.RLIMIT_NOFILE)[0], (HERE.parent / "train_gpt2.py").stat().st_mtime
    clock, room = time.strftime("%Y-%m-%d %H:%M"), f"{free / GIB:.1f} GiB of memory free"
    return found(f"{cores} of {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) per process, {room}, "
                 f"/dev/shm of {shared / GIB:.1f} GiB, {files} open files, clock {clock}",
                 cores < world and f"{cores} cores for {world} processes: take a machine with {2 * world} or more",
                 free < need and f"{room}, the run takes about {need / GIB:.1f}: make room",
                 world > 1 and shared < SHARED_MEMORY and f"/dev/shm has {shared / MIB:.0f} MiB, too few for NCCL: "
                 "start the container with --shm-size=8g",
                 0 <= files < OPEN_FILES and f"a process may open {files} files: ulimit -n 4096",
                 time.time() < written - 86_400 and f"the clock says {clock}, before train_gpt2.py was written: set it")


CHECKS = [("software", software, 30), ("GPUs", visible_gpus, 90), ("GPU state", gpu_state, 90),  # limits in seconds
          ("all-reduce", bandwidth, 120), ("attention", attention, 300), ("float8", float8_products, 240),
          ("data", data, 240), ("disk", disk, 60), ("compiler", compiler, 30), ("host", host, 60)]


def answer(sender, said, check, arguments: tuple) -> None:
    """What the process of one check does: all that is printed goes to a file, the result to the sender."""
    os.setsid()  # so that all it starts can be ended with it
    for stream in (1, 2):
        os.dup2(said.fileno(), stream)
    try:
        sender.send(check(*arguments))
    except BaseException as error:  # a Refusal is a sentence that says what to do
        what = "" if isinstance(error, Refusal) else f"the check failed with {type(error).__name__}: "
        sender.send(("mend", what + " ".join(str(error).split())))


def alone(check, arguments: tuple, limit: float):
    """The result of a function in a process of its own, or a Finding of what became of it. This process itself never
    touches a GPU, for its children could not use one then."""
    fork, deadline = multiprocessing.get_context("fork"), time.monotonic() + limit
    with tempfile.TemporaryFile() as said:
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=answer, args=(sender, said, check, arguments))
        process.start()
        sender.close()
        try:
            while not receiver.poll(0.02) and process.is_alive():
                if time.monotonic() > deadline:
                    return "mend", f"the check did not end in {limit:g} s; training would wait there as well"
            if receiver.poll():
                return receiver.recv()
        except EOFError:  # it ended without a word
            process.join(1)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join(5)
        said.seek(0)
        last = (said.read().decode(errors="replace").strip().splitlines() or ["nothing"])[-1]
        return "mend", f"the check's process ended with status {process.exitcode}; it said {last}"


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status. Raises Refusal for bad options."""
    arguments, states = sys.argv[1:] if arguments is None else arguments, []
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
    config = parse_command_line(arguments)
    gpus = alone(torch.cuda.device_count, (), 20) if config.device != "cpu" else 0
    for name, check, limit in CHECKS:
        state, text = alone(check, (config, gpus if isinstance(gpus, int) else 0), limit)
        print(f"{state:8} {name}: {text}", flush=True)
        states.append(state)
    bad = [name for state, (name, *_) in zip(states, CHECKS, strict=True) if state == "mend"]
    print("verdict  " + (f"mend first: {', '.join(bad)}" if bad else "ready to train")
          + f" ({states.count('ok')} ok, {len(bad)} to mend, {states.count('skipped')} skipped)", flush=True)
    return int(bool(bad))


if __name__ == "__main__":
    status = 130
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):  # nobody wants to read on
        status = main()
    os._exit(status)  # without waiting for processes that hang in the driver and cannot even be killed
