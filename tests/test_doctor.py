"""records/doctor.py: what each check says of good and of bad machines, most of them recorded answers of nvidia-smi, and
the whole tool at a small size."""

import os
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt2
from tools import ROOT, command, configuration, random_documents, start, write_corpus, write_shard

sys.path.insert(0, str(ROOT / "records"))
import doctor

LISTED = "".join(f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-0{i}c4)\n" for i in range(2))
REST = "0x0000000000000001"  # the driver's bits for: idle
ROW = "{}, {}, 1980, 1980, {}, 700.00, {}, {}, {}, 81559\n"  # index, heat, clocks, power, reasons, errors, memory


def state(heat="34", power="700.00", reasons=REST, errors="0", used="4") -> str:
    """nvidia-smi's answer for a GPU at rest and one like this."""
    return ROW.format(0, 34, "700.00", REST, 0, 4) + ROW.format(1, heat, power, reasons, errors, used)


@pytest.fixture
def machine(monkeypatch):
    """A machine whose nvidia-smi answers as told, by its first argument. Errors are raised; None: no driver."""
    answers = {"-L": LISTED, "--query-gpu=driver_version": "580.65.06\n580.65.06\n", "--query-gpu=index": state(),
               "--query-compute-apps": ""}

    def run(question):
        program, query = question.split()[:2]
        assert program == "nvidia-smi"
        answer = next(answers[begin] for begin in answers if query.startswith(begin))
        if isinstance(answer, Exception):
            raise answer
        return answer if answers["-L"] is not None else None

    monkeypatch.setattr(doctor, "run", run)
    monkeypatch.setattr(doctor, "sizes", lambda *_: {"weights": 1 << 30, "optimizer": 2 << 30})
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return answers


@pytest.fixture
def config(tmp_path):
    return configuration(write_corpus(tmp_path), device="auto")


def says(finding, state: str, *parts: str) -> None:
    assert finding[0] == state, finding
    assert all(part in finding[1] for part in parts), finding
    assert "\n" not in finding[1]


# Software.


@pytest.mark.parametrize(("installed", "state", "part"), [
    ({}, "ok", "torch 2.13.0, numpy"),
    ({"torch": "2.13.0+cu130"}, "ok", "torch 2.13.0, numpy"),
    ({"torch": "2.11.1"}, "ok", "torch 2.11.1 (pinned is 2.13.0; 2.11, 2.12, 2.13 work)"),
    ({"torch": "2.10.0"}, "mend", "torch is 2.10.0, expected 2.13.0: python -m pip install -r requirements.txt"),
    ({"numpy": "1.26.4"}, "mend", "numpy is 1.26.4, expected 2.4.6: python -m pip install -r requirements.txt"),
    ({"tqdm": None}, "mend", "tqdm is missing, expected 4.70.1")])
def test_software_is_compared_with_the_pins(machine, config, monkeypatch, tmp_path, installed, state, part):
    pins = {"torch": "2.13.0", "numpy": "2.4.6", "tqdm": "4.70.1"}
    (tmp_path / "requirements.txt").write_text("".join(f"{name}=={pin}\n" for name, pin in pins.items()))
    there, Package = {**pins, **installed}, namedtuple("Package", "version")
    monkeypatch.setattr(doctor, "HERE", tmp_path / "records")
    monkeypatch.setattr(doctor, "distributions", lambda name: [Package(there[name])] * (there[name] is not None))
    says(doctor.software(config, 2), state, part)


@pytest.mark.parametrize(("driver", "cuda", "state", "part"), [
    ("580.65.06", "13.0", "ok", "CUDA 13.0 with driver 580.65.06"),
    ("570.86.15", "12.8", "ok", "CUDA 12.8 with driver 570.86.15"),
    ("570.86.15", "13.0", "mend", "driver 570.86.15 is too old for the CUDA 13.0 of torch: install driver 580"),
    ("580.65.06", None, "mend", "torch has no CUDA, though there is a driver: python -m pip install")])
def test_the_driver_must_be_new_enough_for_torch(machine, config, monkeypatch, driver, cuda, state, part):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    machine["--query-gpu=driver_version"] = f"{driver}\n" * 2
    says(doctor.software(config, 2), state, part)


def test_a_broken_driver_does_not_hide_the_packages(machine, config, tmp_path):
    machine["--query-gpu=driver_version"] = "470.1\n"
    assert doctor.software(config, 0)[0] == "mend"
    says(doctor.software(configuration(tmp_path, device="cpu"), 0), "ok")  # which has no use for a driver
    machine["--query-gpu=driver_version"] = RuntimeError("no answer")
    says(doctor.software(config, 0), "ok", f"torch {torch.__version__.partition('+')[0]}")


# GPUs.


def test_all_gpus_that_the_driver_lists_are_seen(machine, config):
    says(doctor.visible_gpus(config, 2), "ok", "2 x NVIDIA H100 80GB HBM3, all seen by torch")
    machine["-L"] = LISTED.replace("GPU 1: NVIDIA H100 80GB HBM3", "GPU 1: NVIDIA A100-SXM4-40GB")
    says(doctor.visible_gpus(config, 2), "ok", "2 x NVIDIA A100-SXM4-40GB / NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(("changes", "state", "part"), [
    ({"preset": "five-minute"}, "mend", "no NVIDIA driver (nvidia-smi is missing): install the driver"),
    ({"preset": "tiny"}, "ok", "tiny trains on this CPU"),
    ({"preset": "tiny", "device": "cuda"}, "mend", "no NVIDIA driver"),
    ({"device": "cpu"}, "skipped", "--device cpu")])
def test_a_machine_without_a_driver(machine, tmp_path, changes, state, part):
    machine["-L"] = None
    says(doctor.visible_gpus(configuration(write_corpus(tmp_path), **{"device": "auto", **changes}), 0), state, part)


def test_a_driver_that_lists_nothing_or_fails(machine, config):
    machine["-L"] = "No devices found.\n"
    says(doctor.visible_gpus(config, 0), "mend", "the NVIDIA driver lists no GPU")
    machine["-L"] = RuntimeError("nvidia-smi -L says: couldn't communicate with the NVIDIA driver")
    says(doctor.alone(doctor.visible_gpus, (config, 0), 20), "mend", "couldn't communicate with the NVIDIA driver")


@pytest.mark.parametrize(("chosen", "gpus", "parts"), [
    ("1", 1, ["CUDA_VISIBLE_DEVICES=1 hides 1 of 2 x NVIDIA H100", "unset it", "--nproc_per_node=1"]),
    ("", 0, ["CUDA_VISIBLE_DEVICES= hides 2 of 2 x NVIDIA H100", "unset it"])])
def test_hidden_gpus_are_named(machine, config, monkeypatch, chosen, gpus, parts):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    says(doctor.visible_gpus(config, gpus), "mend", *parts)
    assert ("--nproc_per_node" in doctor.visible_gpus(config, gpus)[1]) == (gpus > 0)


def test_a_torch_that_cannot_use_the_gpus_says_why(machine, config, monkeypatch):
    def refuse():
        raise AssertionError("Torch not compiled\nwith CUDA enabled")
    says(doctor.visible_gpus(config, 1), "mend", "torch sees 1: restart the machine")
    monkeypatch.setattr(torch.cuda, "init", refuse)
    says(doctor.visible_gpus(config, 0), "mend", "torch cannot use the 2 x NVIDIA H100", "compiled with CUDA enabled")


def test_as_many_gpus_as_cannot_share_a_step_are_refused(machine, config):
    machine["-L"] = LISTED + "GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-02c4)\n"
    with pytest.raises(train_gpt2.Refusal, match="3 processes cannot share 8 rows"):
        doctor.visible_gpus(config, 3)


# Clocks, power, heat.


@pytest.mark.parametrize(("second", "part"), [
    ({"power": "500.00"}, "GPU 1 has a power limit below 700 W: sudo nvidia-smi -i 1 -pl 700"),
    ({"reasons": "0x0000000000000004"}, "GPU 1 is held back by its power limit"),
    ({"reasons": "0x0000000000000041"}, "GPU 1 is slowed down by heat"),
    ({"reasons": "0x0000000000000080"}, "GPU 1 is slowed down by its hardware"),
    ({"reasons": "0x0000000000000002"}, "GPU 1 has clocks that were set: sudo nvidia-smi -i 1 -rgc"),
    ({"heat": "91"}, "GPU 1 has 91 degrees"),
    ({"errors": "3"}, "GPU 1 had 3 uncorrected memory error(s): sudo nvidia-smi -i 1 -r"),
    ({"used": "40123"}, "GPU 1 has 40123 MiB in use")])
def test_what_slows_a_gpu_down_is_named_with_its_remedy(machine, config, second, part):
    machine["--query-gpu=index"] = state(**second)
    finding = doctor.gpu_state(config, 2)
    says(finding, "mend", part)
    assert "GPU 0" not in finding[1] and "; and " not in finding[1]


def test_gpus_in_order_are_ok_also_where_fields_are_missing(machine, config):
    says(doctor.gpu_state(config, 2), "ok", "2 not throttled", "up to 34 degrees", "power limit 700 W",
         "a process needs about 3072 MiB")
    machine["--query-gpu=index"] = state(power="[N/A]", errors="[N/A]", reasons="[Not Supported]")
    says(doctor.gpu_state(config, 2), "ok")


def test_gpus_with_one_problem_share_a_sentence(machine, config):
    machine["--query-gpu=index"] = "".join(ROW.format(i, 34, "500.00", "0x24", 0, 4) for i in range(2))
    says(doctor.gpu_state(config, 2), "mend", "GPU 0,1 is held back", "GPU 0,1 is slowed down by heat",
         "sudo nvidia-smi -i 0,1 -pl 700")


def test_other_users_and_too_little_memory_are_named(machine, config, monkeypatch):
    machine["--query-compute-apps"] = "4242, /usr/bin/python3, 1234\n"
    says(doctor.gpu_state(config, 2), "mend", "process 4242 (python3) holds 1234 MiB of a GPU: kill 4242")
    machine["--query-compute-apps"] = ""
    monkeypatch.setattr(doctor, "sizes", lambda *_: {"activations": 100 << 30})
    says(doctor.gpu_state(config, 2), "mend", "GPU 0,1 has 81559 MiB of memory, a process needs about 102400")


def test_older_drivers_are_asked_by_the_older_name(machine, config, monkeypatch):
    asked, run = [], doctor.run

    def older(question):
        asked.append(question)
        if "clocks_event_reasons" in question:
            raise RuntimeError('Field "clocks_event_reasons.active" is not a valid field to query.')
        return run(question)

    monkeypatch.setattr(doctor, "run", older)
    machine["--query-gpu=index"] = state(reasons="0x20")
    says(doctor.gpu_state(config, 2), "mend", "GPU 1 is slowed down by heat")
    assert any("clocks_throttle_reasons.active" in question for question in asked)
    machine["-L"] = None
    says(doctor.gpu_state(config, 0), "skipped", "no NVIDIA driver")


def test_run_tells_a_missing_program_from_one_that_fails(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\necho because of the driver >&2\nexit 9\n")
    smi.chmod(0o755)
    assert doctor.run("a-program-that-is-not-there -L") is None
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match="nvidia-smi -L says: NVIDIA-SMI has failed because of the driver"):
        doctor.run("nvidia-smi -L")
    smi.write_text("#!/bin/sh\necho 'a, 1 '\necho\necho b,2\n")
    assert doctor.table("--query-gpu=name") == [["a", "1"], ["b", "2"]]


# All-reduce.


def test_two_processes_on_a_cpu_exchange(config):
    says(doctor.bandwidth(config, 0), "ok", "gloo all-reduce of 4 MiB, 2 processes", "says nothing of GPUs")


@pytest.mark.parametrize(("seconds", "state", "gpus", "speed"), [
    (2**28 * 1.75 / 400e9, "ok", 8, "400.00 GB/s"), (2**28 * 1.75 / 20e9, "mend", 8, "20.00 GB/s"),
    (2**28 / 99e9, "mend", 2, "99.00 GB/s"), (2**28 / 101e9, "ok", 2, "101.00 GB/s")])
def test_bus_bandwidth_of_gpus_is_held_against_an_expectation(config, monkeypatch, seconds, state, gpus, speed):
    """Simulated: each process only says how long the exchange would take."""
    def start_processes(function, arguments, count, start_method):
        world, backend, folder, size = arguments
        assert (function, count, backend, size) == (doctor.exchange, world, "nccl", 2**28)
        Path(folder, "seconds").write_text(str(seconds))

    monkeypatch.setattr(torch.multiprocessing, "start_processes", start_processes)
    says(doctor.bandwidth(config, gpus), state, f"nccl all-reduce of 256 MiB, {gpus} processes", speed)
    says(doctor.bandwidth(config, 1), "skipped", "one GPU")


def test_a_process_that_fails_in_the_exchange_is_quoted(config, monkeypatch):
    real = torch.distributed.all_reduce

    def wrong(numbers):
        real(numbers)
        numbers += torch.distributed.get_rank()

    monkeypatch.setattr(torch.distributed, "all_reduce", wrong)
    says(doctor.alone(doctor.bandwidth, (config, 0), 60), "mend",
         "the check failed with RuntimeError: ArithmeticError: the sum of 2 ones is not 2")


# Attention and the float8 head.


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_agrees_with_a_dense_softmax(tmp_path, dtype):
    says(doctor.attention(configuration(tmp_path, dtype=dtype), 0), "ok", dtype, "a dense softmax")


@pytest.mark.parametrize("name", ["block_mask", "span_mask", "attend"])
def test_wrong_attention_is_found(tmp_path, monkeypatch, name):
    """Masks that see one token further back; attention whose gradient alone is wrong."""
    right = getattr(doctor, name)

    def further(first_key, *rest):
        return right((first_key - 1).clamp_min(0), *rest)

    def unsteady(query, key, value, mask):
        output = right(query, key, value, mask)
        return output.detach() + 1.1 * (output - output.detach()) if output.requires_grad else output

    monkeypatch.setattr(doctor, name, unsteady if name == "attend" else further)
    says(doctor.attention(configuration(tmp_path), 0), "mend", "off by", "--compile none")


def test_attention_that_gives_no_numbers_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "attend", lambda query, key, value, mask: (query + key + value) * torch.nan)
    says(doctor.attention(configuration(tmp_path), 0), "mend", "off by")


@pytest.mark.parametrize(("part", "factor", "state"), [
    (0, 1.0, "ok"), (0, 1.02, "mend"), (2, 1.2, "mend"), (3, 1.2, "mend"), (0, torch.nan, "mend"),
    (2, torch.nan, "mend")])
def test_the_float8_head_is_held_against_the_wide_one(tmp_path, monkeypatch, part, factor, state):
    """One of its results, the loss or a gradient, is off by a factor."""
    def off(hidden, head, turned_head, *rest):
        results = list(train_gpt2.loss_of_chunk(hidden, head, turned_head, *rest))
        if turned_head is not None:
            results[part] = results[part] * factor
        return results

    monkeypatch.setattr(doctor, "loss_of_chunk", off)
    says(doctor.float8_products(configuration(tmp_path, head_dtype="auto"), 0), state, "the float8 head is off",
         "does not use it" if state == "ok" else "give --head-dtype wide")


def test_a_head_that_is_not_float8(tmp_path):
    says(doctor.float8_products(configuration(tmp_path, head_dtype="wide"), 0), "skipped", "wide")
    with pytest.raises(train_gpt2.Refusal, match="--head-dtype float8 takes"):
        doctor.float8_products(configuration(tmp_path, head_dtype="float8"), 0)


def test_a_gpu_without_float8_is_no_fault(tmp_path, monkeypatch):
    config = configuration(tmp_path, head_dtype="auto", device="auto", dtype="bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    says(doctor.float8_products(config, 1), "skipped", "NVIDIA A100 has no float8")


# Data, disk, compiler, host.


def test_text_that_run_sh_would_make_is_not_missed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = train_gpt2.parse_command_line(["--preset", "tiny"])
    says(doctor.data(tiny, 0), "skipped", "./run.sh makes shards")
    (tmp_path / "data" / "text").mkdir(parents=True)
    (tmp_path / "data" / "text" / "text_train_000001.bin").touch()  # what is there is looked at
    with pytest.raises(train_gpt2.Refusal):
        doctor.data(tiny, 0)


def test_whole_shards_that_suffice_are_ok(config):
    says(doctor.data(config, 0), "ok", "3 training shard(s), 21,000 tokens, enough for 8 steps",
         "2 validation shard(s), 2,000 targets")


@pytest.mark.parametrize(("broken", "message"), [
    ("text_train_000000.bin", "holds token 999 at position 1050623"), ("text_train_000002.bin", "holds token 999"),
    ("text_val_000000.bin", "holds token 999"), ("text_val_000001.bin", "holds token 999"),
    ("truncated", "truncated; fetch or write it again"), ("missing", "no shard matches"),
    ("steps", "the run needs 102,401 training tokens")])
def test_faults_of_the_data_are_found(tmp_path, broken, message):
    folder = write_corpus(tmp_path)
    if broken == "truncated":
        path = folder / "text_train_000001.bin"
        path.write_bytes(path.read_bytes()[:-2])
    elif broken == "missing":
        for path in folder.glob("text_val_*"):
            path.unlink()
    elif broken != "steps":  # a last token beyond the vocabulary, where opening the shards does not look
        tokens = np.tile(random_documents(2048), 513)
        tokens[-1] = 999
        write_shard(folder / broken, tokens, 257, 256)
    with pytest.raises(train_gpt2.Refusal, match=message):
        doctor.data(configuration(folder, steps=100 if broken == "steps" else 8, val_tokens=100), 0)


def test_room_on_the_disk(machine, tmp_path, monkeypatch):
    config = configuration(tmp_path, out=tmp_path / "new" / "logs")
    says(doctor.disk(config, 2), "ok", f"free in {tmp_path}, a run takes about 4.21 (model.pt 1.00, ",
         "compile caches 0.20", "1 checkpoint(s) 3.00")
    assert not list(tmp_path.iterdir())  # nothing is left behind
    usage = namedtuple("usage", "total used free")
    saves = configuration(tmp_path, out=config.out, save_every=100, keep=3)
    for settings, free, state in ((config, 4.2, "mend"), (config, 4.3, "ok"),
                                  (saves, 13.2, "mend"), (saves, 13.3, "ok")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, free=free: usage(0, 0, free * 2**30))
        says(doctor.disk(settings, 2), state, f"{free} GiB free", "make room there" * (state == "mend"))


def test_a_folder_that_cannot_be_written(machine, tmp_path):
    (tmp_path / "file").touch()
    says(doctor.disk(configuration(tmp_path, out=tmp_path / "file" / "logs"), 0), "mend",
         f"cannot write in {tmp_path / 'file'}: Not a directory: name a writable place with --out FOLDER")
    if os.path.isdir("/proc/self"):  # a file system that takes no files, not even root's
        says(doctor.disk(configuration(tmp_path, out="/proc/logs"), 0), "mend", "cannot write in /proc")


def test_the_compiler_and_what_earlier_runs_left_for_it(tmp_path, monkeypatch):
    config, tools = configuration(tmp_path, device="auto", compile="auto", out=tmp_path), {"cc": "/usr/bin/cc"}
    monkeypatch.setattr(doctor.shutil, "which", tools.get)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    says(doctor.compiler(config, 2), "mend", "Python.h is missing")
    (tmp_path / "Python.h").touch()
    says(doctor.compiler(config, 2), "ok", "Triton, /usr/bin/cc, compile caches for 0 of 2", "takes minutes")
    for run, ranks in (("20260101-000000-aa", (0, 1)), ("20260102-000000-aa", (0,)), ("20260103-000000-aa", ())):
        (tmp_path / run).mkdir()
        for rank in ranks:
            (tmp_path / run / f"compile_cache_{rank}.bin").touch()
    says(doctor.compiler(config, 2), "ok", "compile caches for 1 of 2 processes", "20260102-000000-aa")
    tools.clear()
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    says(doctor.compiler(config, 2), "mend", "no C compiler", "Triton is missing")
    says(doctor.compiler(config, 0), "skipped", "on a CPU")


def test_the_host(machine, config, monkeypatch):
    usage = namedtuple("usage", "total used free")
    limits, shared, now = [65_536], [2**36], time.time
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(shared[0], 0, 0))
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (limits[0], limits[0]))
    says(doctor.host(config, 0), "ok", "16 of", "/dev/shm of 64.0 GiB", "65536 open files")
    says(doctor.host(config, 17), "mend", "16 cores for 17 processes: take a machine with 34 or more")
    shared[0] = 2**26
    says(doctor.host(config, 2), "mend", "/dev/shm has 64 MiB", "--shm-size=8g")
    says(doctor.host(config, 1), "ok")
    limits[0] = 256
    says(doctor.host(config, 1), "mend", "a process may open 256 files: ulimit -n 4096")
    limits[0] = -1  # without a limit
    says(doctor.host(config, 1), "ok")
    monkeypatch.setattr(doctor, "sizes", lambda *_: {"weights": 2**50})
    says(doctor.host(config, 0), "mend", "GiB of memory free, the run takes about 1048576.0: make room")
    monkeypatch.setattr(doctor, "sizes", lambda *_: {"weights": 0})
    monkeypatch.setattr(doctor.time, "time", lambda: now() - 10**9)
    says(doctor.host(config, 0), "mend", "before train_gpt2.py was written: set it")


# Checks that fail, die or hang; the whole tool.


def test_no_check_hides_the_others(monkeypatch, tmp_path, capfd):
    left = tmp_path / "still alive"

    def raising(config, gpus):
        raise ValueError("no such\nthing")

    def refusing(config, gpus):
        raise train_gpt2.Refusal("found that; give this")

    def leaving(config, gpus):
        sys.exit(0)

    def dying(config, gpus):
        os.write(2, b"first\nlast words\n")
        os._exit(7)

    def hanging(config, gpus):
        if os.fork() == 0:  # what it has started is ended with it
            time.sleep(2)
            left.touch()
            os._exit(0)
        time.sleep(60)

    def good(config, gpus):
        os.write(1, b"noise\n")
        return "ok", f"all of it, {gpus}"

    checks = [raising, refusing, leaving, dying, hanging, good]
    monkeypatch.setattr(doctor, "CHECKS", [(check.__name__, check, 1 if check is hanging else 30) for check in checks])
    begin = time.monotonic()
    assert doctor.main(["--preset", "tiny", "--device", "cpu"]) == 1
    assert time.monotonic() - begin < 10
    assert capfd.readouterr().out.splitlines() == [
        "mend     raising: the check failed with ValueError: no such thing",
        "mend     refusing: found that; give this",
        "mend     leaving: the check failed with SystemExit: 0",
        "mend     dying: the check's process ended with status 7; it said last words",
        "mend     hanging: the check did not end in 1 s; training would wait there as well",
        "ok       good: all of it, 0",
        "verdict  mend first: raising, refusing, leaving, dying, hanging (1 ok, 5 to mend, 0 skipped)"]
    time.sleep(1.5)
    assert not left.exists()


def test_the_whole_tool_on_a_good_and_on_a_bad_machine(tmp_path, capfd):
    """Ten lines and a verdict, and an exit status for scripts; the second time as a command."""
    folder, names = write_corpus(tmp_path), [name for name, *_ in doctor.CHECKS]
    assert doctor.main(command(folder)) == 0
    *lines, verdict = capfd.readouterr().out.splitlines()
    assert [line[9:].split(":")[0] for line in lines] == names and len(names) == 10
    assert verdict == "verdict  ready to train (6 ok, 0 to mend, 4 skipped)"
    (folder / "text_train_000001.bin").write_bytes(b"")
    bad = start([ROOT / "records" / "doctor.py", *command(folder)])
    assert bad.returncode == 1 and not bad.stderr, bad
    *lines, verdict = bad.stdout.splitlines()
    assert [line[9:].split(":")[0] for line in lines] == names
    assert verdict == "verdict  mend first: data (5 ok, 1 to mend, 4 skipped)"
    assert lines[6].startswith("mend     data: ") and "less than a shard's header" in lines[6]
    assert not (folder / "logs").exists()


def test_bad_options_are_one_line():
    wrong = start([ROOT / "records" / "doctor.py", "--preset", "huge"])
    assert wrong.returncode == 1 and not wrong.stdout
    assert wrong.stderr == ("--preset huge is not one of gpt2, five-minute, gpt2-medium, gpt2-xl, tiny; the nearest is "
                            "--preset gpt2-medium\n")
