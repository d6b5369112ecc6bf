"""The presets: their sizes, what they leave out, and that the larger ones are the same recipe."""

from dataclasses import asdict, fields

import pytest
import torch

import train_gpt2
from train_gpt2 import (GPT, PRESETS, TECHNIQUES, Config, Recipe, check_config, parse_command_line, preset_values,
                        tokens_until)


@pytest.mark.parametrize("preset, parameters, tokens", [
    ("gpt2", 490_907_981, 361_758_720), ("five-minute", 162_201_641, 983_040_000),
    ("gpt2-medium", 702_721_241, 1_247_019_008), ("gpt2-xl", 1_497_544_937, 5_261_885_440)])
def test_sizes(preset, parameters, tokens):
    config = Config(**preset_values(preset) | {"dtype": "bfloat16"})
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(config, 50257).parameters()) == parameters
    assert tokens_until(config.steps, config) == tokens


def test_settings_belong_to_the_recipe_or_to_the_run():
    recipe, run = {f.name for f in fields(Recipe)}, {f.name for f in fields(Config)} - {f.name for f in fields(Recipe)}
    assert run == {"train_files", "val_files", "out", "save_every", "keep", "resume", "device", "head_dtype", "compile",
                   "attention_kernel", "mlp_kernel", "micro_tokens", "recompute", "loss_chunk", "timeout"}
    moved = {name for technique in TECHNIQUES.values() for name in technique}
    assert moved <= recipe | {"head_dtype"}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_leave_out_what_they_say(preset):
    values, config = preset_values(preset), check_config(Config(**preset_values(preset)))
    assert config == parse_command_line(["--preset", preset])
    for name in PRESETS[preset].get("without", ()):
        for setting, neutral in TECHNIQUES[name].items():
            assert getattr(config, setting) == PRESETS[preset].get(setting, neutral)
    assert set(values) <= {f.name for f in fields(Config)}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_each_technique_can_be_left_out(name):
    """It alone: nothing changes but its settings, and what follows from them."""
    preset = "five-minute" if name in ("unet-skips", "value-residual") else "gpt2"
    full, without = (parse_command_line(["--preset", preset, *rest]) for rest in ([], ["--without", name]))
    assert asdict(without) == asdict(full) | TECHNIQUES[name] != asdict(full)


def test_a_technique_that_a_preset_has_not_cannot_be_left_out():
    for arguments in (["--preset", "tiny", "--without", "yarn"], ["--without", "smear,nonsense"]):
        with pytest.raises(train_gpt2.UserError, match="--without.*only.*bigrams"):
            parse_command_line(arguments)


def test_the_order_in_which_techniques_are_left_out_does_not_matter():
    """"blocks" puts back what "none" took away."""
    both = ["x0-shortcut", "sublayer-mixing"]
    values = [Config(**train_gpt2.turned_off(preset_values("gpt2"), order)) for order in (both, both[::-1])]
    assert values[0] == values[1] and values[0].mixing == "none"


@pytest.mark.parametrize("preset", ["gpt2-medium", "gpt2-xl"])
def test_larger_presets_are_the_same_recipe(preset):
    large, base = Config(**preset_values(preset)), Config()
    same = {"layers", "heads", "width", "steps", "preset", "muon_lr"}
    lists = {"short_layers", "paired_layers", "attention_free", "value_layers", "xsa_layers", "gated_skip",
             "attention_source"}
    assert {f.name for f in fields(Recipe) if getattr(large, f.name) != getattr(base, f.name)} <= same | lists
    for name in lists:
        assert (len(getattr(large, name)) > 0) == (len(getattr(base, name)) > 0)
    skip, (source,) = large.gated_skip, large.attention_source
    assert len(large.value_layers) == 5 and max(large.value_layers) == large.layers - 1
    assert {*large.xsa_layers} == {*range(1, large.layers)} - {*large.paired_layers, *large.attention_free}
    assert skip[0] not in large.short_layers and (skip[1],) == large.attention_free and source > skip[1]
