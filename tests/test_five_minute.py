"""The five-minute recipe's losses as they were before the later records were built in: the baseline of everything."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from tools import ROOT, losses

import train_gpt2
from train_gpt2 import Processes, flag, parse_command_line

sys.path[:0] = [str(ROOT / "records"), str(ROOT / "data")]
import check

STORED = json.loads((ROOT / "tests" / "five_minute_losses.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["float32", *(pytest.param(name, marks=pytest.mark.slow) for name in STORED
                                               if name != "float32")])
def test_losses_are_those_stored(tmp_path, name):
    check.write_text(tmp_path)
    gone = "mlp_ratio", "gate_channels"
    changes = {key: value for key, value in STORED[name]["changes"].items() if key not in gone}
    changes["window"] -= 1  # it counted the query itself then
    changes["val_row_tokens"] = changes["row_tokens"]
    config = parse_command_line([f"{flag(key)}={str(value).lower()}" for key, value in changes.items()] + [
        f"--train-files={tmp_path}/train.bin", f"--val-files={tmp_path}/val.bin", f"--out={tmp_path}/logs"])
    run = train_gpt2.train(replace(config, val_tokens=config.val_tokens), Processes(0, 1, torch.device("cpu")))
    found = losses(run) + losses(run, "val_loss")
    expected = STORED[name]["losses"]
    assert found[:len(expected)] == pytest.approx(expected, abs=1e-9 if config.dtype == "float64" else 1e-6)
