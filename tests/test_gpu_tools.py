"""What is run on a machine with a GPU, tried without one: records/kernels.py, records/doctor.py, tests/gpu.sh."""

import subprocess
import sys

import pytest
from tools import ROOT, command

from train_gpt2 import UserError

sys.path.insert(0, str(ROOT / "records"))
import doctor
import kernels


def test_busy_time_counts_every_moment_once():
    assert kernels.busy_time([(0, 10), (5, 15), (6, 8), (30, 35)]) == 20


@pytest.mark.parametrize(("name", "kind"), [
    ("triton_tem_fused_flex_attention_backward_3", "attention"), ("nvjet_tst_128x256_TNT", "matrix products"),
    ("sm90_xmma_gemm_bf16", "matrix products"), ("triton_red_fused_logsumexp_tanh", "loss"), ("Memcpy DtoH", "copies and fills"),
    ("embedding_dense_backward", "tables"), ("triton_poi_fused_add_mul_1", "norms and other pointwise work")])
def test_kernels_have_a_kind(name, kind):
    assert kernels.kind_of(name) == kind


def test_operators_of_a_step_on_a_cpu(corpus, capsys):
    rows = kernels.main([*command(corpus), "--stage", "0"])
    assert sum(share for name, _, share, _ in rows if not name.startswith("  ")) == pytest.approx(1)
    assert "matrix products" in capsys.readouterr().out
    with pytest.raises(UserError, match="--stage 9"):
        kernels.main([*command(corpus), "--stage", "9"])


def test_doctor_finds_what_must_be_mended(corpus, tmp_path, capsys):
    doctor.found.clear()
    assert doctor.main(command(corpus, out=tmp_path)) == 0 and "ready" in capsys.readouterr().out
    doctor.found.clear()
    assert doctor.main(command(tmp_path / "nowhere", out=tmp_path)) == 1
    assert "mend  data" in capsys.readouterr().out


def test_gpu_script_is_a_script():
    assert subprocess.run(["bash", "-n", ROOT / "tests" / "gpu.sh"]).returncode == 0
    done = subprocess.run(["bash", ROOT / "tests" / "gpu.sh", "--nonsense"], capture_output=True, text=True)
    assert done.returncode != 0 and len((done.stdout + done.stderr).strip().splitlines()) == 1
