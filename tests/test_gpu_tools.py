"""What is run on a machine with a GPU, tried without one: records/kernels.py, records/doctor.py, tests/gpu.sh."""

import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tools import ROOT, command, configuration, start
from torch.autograd import DeviceType

import train_gpt2
from train_gpt2 import UserError, parse_command_line

sys.path.insert(0, str(ROOT / "records"))
import doctor
import kernels


@pytest.mark.parametrize(("name", "marks", "kind"), [  # names as an H100's profile has them
    ("triton_tem_fused__unsafe_view_flex_attention_backward_mul_sigmoid_transpose_5", (), "attention"),
    ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN", (), "matrix products"),
    ("nvjet_sm90_qqtst_192x192_128x4_2x1_v_bz_coopB_TNN", ("loss",), "matrix products"),
    ("triton_red_fused__scaled_mm__to_copy_add_exp_ge_logsumexp_mul_tanh_transpose_3", ("loss",), "loss"),
    ("triton_poi_fused__to_copy_add_copy_copy__div_gt_lerp_mul_pow_rsub_sqrt_0", ("optimizer",), "optimizer"),
    ("nvjet_sm90_tst_128x128_64x6_2x1_v_bz_TNT", ("optimizer",), "optimizer"),
    ("triton_per_fused__fused_rms_norm_add_mul_0", (), "norms and other pointwise"),
    ("void at::native::(anonymous namespace)::sum_and_scatter<c10::BFloat16, int>", (), "tables"),
    ("Memcpy DtoD (Device -> Device)", (), "copies and fills"), ("aten::mm", (), "matrix products"),
    ("aten::embedding_dense_backward", (), "tables"), ("ncclDevKernel_ReduceScatter", (), "communication")])
def test_kernels_have_a_kind(name, marks, kind):
    assert kernels.kind_of(name, set(marks)) == kind


def test_kernels_of_the_steps_that_count():
    """Two steps from 1,000 to 3,000 us, in which the loss runs from 1,400 on, on another stream beside a
    copy. A prefetch before the first kernel is not waited for; what ran before the mark is another step's."""
    def event(name, start, end, device=DeviceType.CUDA):
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(name=name, device_type=device, time_range=span)

    rows, idle = kernels.summary([
        event(kernels.MARKS[0], 1000, 3000), event(kernels.MARKS[0], 500, 900, DeviceType.CPU),
        event("loss", 1400, 1800), event("loss", 600, 800, DeviceType.CPU), event("gemm", 600, 900),
        event("Memcpy HtoD", 1000, 1050), event("gemm", 1200, 1600), event("exp", 1500, 1700),
        event("Memcpy HtoD", 1550, 1650), event("gemm", 2800, 3000), event("aten::mm", 1300, 1310, DeviceType.CPU)], 2)
    found = {name: (time, calls) for name, time, _, calls in rows}
    assert found["matrix products"] == found["  gemm"] == pytest.approx((0.3, 1.0))
    assert found["loss"] == pytest.approx((0.15, 1.0)) and "optimizer" not in found  # the copy beside it, too
    assert found["copies and fills"] == pytest.approx((0.025, 0.5))
    assert idle == pytest.approx(1 - 700 / 1800)
    assert sum(share for name, _, share, _ in rows if name[0] != " ") == pytest.approx(1)


def test_operators_of_a_step_on_a_cpu(corpus, tmp_path, capsys):
    trace = tmp_path / "trace.json"
    rows = kernels.main([*command(corpus), "--stage", "0", "--trace", str(trace)])
    shares = {name: share for name, _, share, _ in rows if name[0] != " "}
    assert sum(shares.values()) == pytest.approx(1) and trace.stat().st_size > 10_000
    assert {"matrix products", "attention", "loss", "optimizer", "tables"} < set(shares)
    assert all(name in capsys.readouterr().out for name in ["idle"])
    with pytest.raises(UserError, match="--stage 9"):
        kernels.main([*command(corpus), "--stage", "9"])
    with pytest.raises(UserError, match="--trace .*trace.json cannot be written"):
        kernels.main([*command(corpus), "--trace", str(tmp_path / "none" / "trace.json")])


@pytest.fixture
def machine(monkeypatch):
    """A function: pretend that torch sees so many GPUs and the driver lists so many."""
    def pretend(seen: int, listed: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        monkeypatch.setattr(doctor.shutil, "which", lambda name: name if listed else None)
        monkeypatch.setattr(doctor.subprocess, "getoutput", lambda _: "GPU 0: NVIDIA H100\n" * listed)
    return pretend


def lines_of(capsys) -> dict[str, str]:
    """The verdict of each check by its name."""
    out = capsys.readouterr().out.splitlines()
    return {line[5:].split(":")[0]: line for line in out if line[:5] in ("ok   ", "mend ")}


def test_the_doctor_on_a_laptop(machine, tmp_path, monkeypatch, capsys):
    """What ./run.sh would run there: tiny, whose text it makes."""
    machine(0, 0)
    monkeypatch.chdir(tmp_path)
    assert doctor.main([]) == 0
    lines = lines_of(capsys)
    assert list(lines) == ["software", "graphics", "memory", "data", "disk", "attention"]
    assert "--preset tiny" in lines["graphics"] and "GiB" in lines["graphics"] and "run.sh" in lines["data"]


def test_the_doctor_names_commands_that_work_in_the_current_folder(tmp_path):
    folder = tmp_path / "my data"
    folder.mkdir()
    code = "import doctor; print(doctor.FINEWEB); print(doctor.INSTALL)"
    done = start(["-c", code], cwd=folder, env={"PYTHONPATH": str(ROOT / "records")})
    fetch, install = map(shlex.split, done.stdout.splitlines())
    assert (folder / fetch[1]).samefile(ROOT / "data/fineweb.py")
    assert (folder / install[-1]).samefile(ROOT / "requirements.txt")
    assert fetch[-2:] == ["--out", "data/fineweb10B"]  # where the trainer looks


def test_the_doctor_finds_what_must_be_mended(machine, corpus, tmp_path, monkeypatch, capsys):
    machine(0, 2)  # the driver lists GPUs that torch cannot see
    (tmp_path / "file").touch()
    monkeypatch.setattr(train_gpt2, "span_mask", lambda first_key: [
        (slice(0, 1024), slice(0, 1024), torch.ones(2, 1, 1024, 1024, dtype=torch.bool))])
    monkeypatch.setattr(doctor.torch, "__version__", "2.4.0")
    assert doctor.main(command(corpus, device="auto", steps=10**6, out=tmp_path / "file" / "logs")) == 1
    lines = lines_of(capsys)
    assert {name: line[:4] for name, line in lines.items()} == {
        "software": "mend", "graphics": "mend", "memory": "ok  ", "data": "mend", "disk": "mend", "attention": "mend"}
    assert "2 GPUs" in lines["graphics"] and "--repeat" in lines["data"] and "pip install" in lines["software"]
    machine(1, 2)
    with pytest.raises(UserError, match="torch .* sees 1"):
        doctor.graphics(configuration(corpus, device="auto"), 1)


@pytest.mark.parametrize(("free", "gpus", "needle"), [(79, 8, ""), (20, 1, "--recompute true"), (2, 1, "no setting")])
def test_the_doctor_knows_what_fits(free, gpus, needle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free << 30, 80 << 30))
    monkeypatch.setattr(train_gpt2, "for_device", lambda config, processes: (config, True, True))
    config = parse_command_line(["--dtype", "bfloat16", "--train-files", "no_train_*.bin"])
    if needle != "no setting":
        assert needle in doctor.memory(config, gpus)
        return
    with pytest.raises(UserError, match=needle):
        doctor.memory(config, gpus)


@pytest.mark.parametrize(("number", "factor"), [(0, 1.0), (0, 1.2), (1, 1.2), (2, 1.2), (1, torch.nan)])
def test_the_float8_head_is_held_against_the_wide_one(number, factor, tmp_path, monkeypatch):
    """One of its products, logits or a gradient, is off by a factor."""
    factors = [1.0, 1.0, 1.0]
    factors[number] = factor

    def off(*arguments, right=train_gpt2.product, **named):
        narrow = arguments[0].dtype.itemsize == 1
        return right(*arguments, **named) * (factors.pop(0) if narrow else 1)

    monkeypatch.setattr(train_gpt2, "product", off)
    if factor == 1.0:
        assert "off by" in doctor.float8_head(configuration(tmp_path), 0)
        return
    with pytest.raises(UserError, match="--head-dtype wide"):
        doctor.float8_head(configuration(tmp_path), 0)


@pytest.mark.slow
def test_two_processes_exchange(tmp_path):
    assert "2 processes" in doctor.exchange(configuration(tmp_path), 0)


def gpu_script(*options) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(ROOT / "tests" / "gpu.sh"), *map(str, options)], capture_output=True, text=True,
                          check=False)


@pytest.mark.parametrize(("options", "needle"), [
    (["--devise", "cpu"], "--devise"), (["--device", "tpu"], "--device cpu"), (["--out"], "--out"),
    (["--corpus", "/nowhere"], "/nowhere"), (["--patience", "long"], "--patience")])
def test_gpu_script_says_what_is_wrong_in_one_line(options, needle):
    done = gpu_script(*options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and needle in done.stderr


@pytest.mark.slow
def test_gpu_script_in_small(corpus, tmp_path):
    """Its steps as they are, on a CPU: the tools take the options that it gives, and their figures are found."""
    done = gpu_script("--device", "cpu", "--patience", "4", "--corpus", corpus, "--out", tmp_path)
    rows = {line.split()[0]: line for line in (tmp_path / "table.txt").read_text().splitlines()[2:]}
    assert done.returncode == 0 and list(rows) == ["compile", "time-five-minute", "time-gpt2", "kernels",
                                                   "train-five-minute", "train-gpt2", "tests", "logs"], done.stdout
    assert all(line.split()[1] == "ok" for name, line in rows.items() if name != "logs")
    assert rows["compile"].count("compiled in") == 4 and "ms/step" in rows["time-gpt2"] and "idle" in rows["kernels"]
    assert " at 0 ms;" in rows["train-gpt2"] and "passed" in rows["tests"]
