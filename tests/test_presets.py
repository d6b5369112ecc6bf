"""The larger models, gpt2-medium and gpt2-xl: their sizes, schedules and rates are those of their runs, as the records
state them, and a scaled-down sibling of each trains through every stage of its schedule."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from test_optimizers import settings_by_parameter
from tools import ROOT, losses, metrics, random_batch, run_here, small_model, write_corpus

from train_gpt2 import (
    GPT,
    Config,
    Processes,
    Refusal,
    attention_masks,
    last_tied_step,
    layer_plan,
    momentum_schedule,
    multi_token_weights,
    optimizer_groups,
    parse_command_line,
    rate_schedule,
    stage_borders,
    stage_of,
    tokens_until,
    value_at,
    windows_at,
    yarn_schedule,
)

sys.path.append(str(ROOT / "records"))
import timing  # noqa: E402

ALONE = Processes(0, 1, torch.device("cpu"))
MEDIUM, XL = (parse_command_line(["--preset", preset]) for preset in ("gpt2-medium", "gpt2-xl"))


def shapes_of(config: Config) -> dict[str, tuple]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(config, 50257, torch.bfloat16).named_parameters()}


# ---- gpt2-medium -----------------------------------------------------------------------------------------------------


def test_medium_has_the_parameters_of_its_record():
    shapes = shapes_of(MEDIUM)
    assert {name: shape for name, shape in shapes.items() if "." not in name} == {
        "embedding": (50304, 1024), "head": (50304, 1024), "second_table": (50304, 1024), "smear_mix": (),
        "smear_gate": (16,), "skip_mix": (3,), "skip_gate": (3, 16), "backout_mix": ()}
    assert [shapes[f"value_tables.{i}"] for i in range(5)] == [(50304, 1024)] * 5 and "value_tables.5" not in shapes
    matrices = sum(math.prod(s) for n, s in shapes.items() if n.endswith((".attention", ".mlp")))
    assert round(matrices / 1e6, 2) == 201.33 and sum(n.endswith(".attention") for n in shapes) == 16
    assert round(sum(map(math.prod, shapes.values())) / 1e6, 2) == 613.42


def test_medium_has_the_layers_of_its_record():
    plan = layer_plan(MEDIUM)
    assert [i for i, layer in enumerate(plan) if not layer.short] == [0, 4, 11, 15]
    assert [i for i, layer in enumerate(plan) if layer.offset] == [0, 4, 11, 15]
    assert [layer.table for layer in plan] == [0, 1, 2, 3, 4, *[None] * 6, 0, 1, 2, 3, 4]
    assert all(layer.attends and not layer.paired for layer in plan)
    assert small_model(preset="gpt2-medium").skips == {9: 6, 10: 4, 11: 2} and MEDIUM.backout == (11,)


def test_medium_has_the_schedule_of_its_record():
    borders = [392, 784, 1175, 1567, 1959, 2350, 2742, 3134]
    assert stage_borders(MEDIUM)[:8] == borders and stage_borders(MEDIUM)[-1] == 4700 and MEDIUM.steps == 4740
    assert tokens_until(4740, MEDIUM) == 2_176_974_848
    long, short = (3, 7, 11, 13, 15, 17, 19, 21, 23, 23), (1, 3, 5, 6, 7, 8, 9, 10, 11, 11)
    for step, *blocks in zip((0, *borders, 4700), long, short, strict=True):
        assert windows_at(step, MEDIUM) == tuple(128 * block for block in blocks)
        assert step == 0 or windows_at(step - 1, MEDIUM) != windows_at(step, MEDIUM) or step == 4700
    assert windows_at(4740, MEDIUM) == (27 * 128, 11 * 128)
    for step, batch in ((0, 1), (391, 1), (392, 2), (784, 3), (1174, 3), (1175, 4), (4739, 4)):
        assert value_at(MEDIUM.tokens_per_step, stage_of(step, MEDIUM)) == batch * 131_072
    assert [rate_schedule(step, MEDIUM) for step in (0, 391, 392, 783, 784, 1175, 1176, 1410)] == [
        1, 1, 1.52, 1.52, 1.73, 1.73, 2, 2]
    for step, factor in ((1567, 1.909), (2350, 1.457), (3133, 1.005), (3917, 0.552), (4500, 0.216), (4700, 0.1),
                         (4739, 0.1)):
        assert rate_schedule(step, MEDIUM) == pytest.approx(factor, abs=6e-4)
    for step, momentum in ((0, 0.85), (150, 0.9), (300, 0.95), (4690, 0.95), (4715, 0.9), (4739, 0.852)):
        assert momentum_schedule(step, MEDIUM) == pytest.approx(momentum)
    for step, weights in ((0, (1, 0.5, 0.25)), (196, (1, 0.5, 0.25 * (1 - 3 * 196 / 1175))),
                          (392, (1, 0.5 * (2 - 3 * 392 / 1175))), (784, (1,)), (4739, (1,))):
        assert multi_token_weights(step, MEDIUM) == pytest.approx(weights)
    assert last_tied_step(MEDIUM) == 785
    scales = [yarn_schedule(stage, MEDIUM)[1] for stage in range(13)]
    assert scales == pytest.approx([0.1, 0.116946, 0.127518, *[0.131778] * 10], rel=1e-5)
    assert torch.equal(yarn_schedule(3, MEDIUM)[0], yarn_schedule(12, MEDIUM)[0])


def test_medium_has_the_first_values_of_its_record():
    model = small_model(2000, torch.float32, preset="gpt2-medium", width=1024, heads=8, layers=3, short_layers=(1,),
                        value_layers=(0,), gated_skip=(0, 2), backout=(1,))
    assert model.blocks[0].attention[:3].abs().max().item() == pytest.approx(3**0.5 / 32, rel=1e-3)
    assert model.blocks[0].mlp[0].abs().max().item() == pytest.approx(3**0.5 / 64, rel=1e-3)
    assert model.head.std().item() == pytest.approx(0.005, rel=0.01)
    assert model.second_table.std().item() == pytest.approx(1, rel=0.01)
    block = model.blocks[1]
    assert [p.item() for p in (block.residual, block.x0, block.second, block.into, block.out)] == pytest.approx(
        [1.05, 0, 0, 0.5, 1])


def test_medium_has_the_rates_of_its_record():
    model = small_model(preset="gpt2-medium")
    groups = optimizer_groups(model, model.config, torch.float64, ALONE)
    found, tables, head = settings_by_parameter(model, groups), (0.3, 0.8, 0.95, 0.025), (0.004, 0.8, 0.95, 0.75)
    wanted = {"head": head, "embedding": head, "second_table": tables, "smear_gate": (4e-5, 0.8, 0.95, 0),
              "skip_gate": (4e-5, 0.8, 0.95, 0)} | {f"value_tables.{i}": tables for i in range(5)}
    wanted |= dict.fromkeys(("x0", "second"), (0.02, 0.8, 0.95, 0))
    wanted |= dict.fromkeys(("residual", "into", "out", "smear_mix", "skip_mix", "backout_mix"), (0.04, 0.9, 0.99, 0))
    adam = {name: settings for name, settings in found.items() if settings[0] != "muon"}
    assert {*adam} == {*wanted}
    for name, settings in adam.items():
        assert settings == pytest.approx(wanted[name]), name
    assert {name: groups[name].scale.unique().tolist() for name in ("mlp", "attention", "gates")} == {
        "mlp": [2, 4], "attention": [2], "gates": [0.1]}
    assert groups["gates"].length == 16 + 10 and groups["gates"].shard.shape[1:] == (4, 16)
    assert {groups[name].learning_rate for name in ("mlp", "attention", "gates")} == {0.015}
    assert {name: group.every for name, group in groups.items()} == {
        name: 1 if name in ("mlp", "attention", "gates") else 2 for name in groups}
    assert MEDIUM.adam_epsilon * 16_384 == pytest.approx(1e-8)  # of losses summed over a row


# ---- gpt2-xl ---------------------------------------------------------------------------------------------------------


def test_xl_has_the_parameters_of_its_run():
    shapes = shapes_of(XL)
    assert sum(map(math.prod, shapes.values())) == 1_549_467_648
    assert {name: shape for name, shape in shapes.items() if "." not in name} == {"head": (50304, 1536)}
    assert {name.split(".")[-1]: shape for name, shape in shapes.items() if "." in name} == {
        "attention": (4, 1536, 1536), "mlp": (2, 6144, 1536)}
    assert len(shapes) == 1 + 2 * 52


def test_xl_has_the_schedule_and_rates_of_its_run():
    assert tokens_until(XL.steps, XL) == 9_999_482_880 == 20_344 * 491_520
    assert rate_schedule(20_344 - 5812, XL) == 1 and rate_schedule(20_344 - 2906, XL) == 0.5
    assert {momentum_schedule(step, XL) for step in (0, 100, 20_343)} == {0.95}
    model = small_model(preset="gpt2-xl")
    groups = optimizer_groups(model, XL, torch.float64, ALONE)
    assert {*groups} == {"head", "mlp", "attention"}
    assert settings_by_parameter(model, groups)["head"] == (0.0018, 0.9, 0.95, 0)
    # an entry moves by 0.00018 per step: a square orthogonal matrix has entries of 1 / sqrt(1536), (6144, 1536) half
    steps = {name: groups[name].learning_rate * groups[name].scale.flatten()[:2] for name in ("attention", "mlp")}
    assert (steps["attention"] / 1536**0.5).tolist() == pytest.approx([0.00018] * 2)
    assert (steps["mlp"] / 6144**0.5).tolist() == pytest.approx([0.00018] * 2)


def test_xl_begins_as_its_run_did():
    """Its table is the head as well, and nothing is added to the stream yet: each token predicts itself with a logit of
    sqrt(width / 3), and that, 22.63, was the first loss."""
    model = small_model(3000, torch.float32, preset="gpt2-xl", width=1536, heads=12, layers=2, tied_init=XL.tied_init)
    for weights in (model.blocks[0].attention[:3], model.blocks[0].mlp[0], model.head):
        assert weights.std().item() == pytest.approx(1 / (3 * 1536) ** 0.5, rel=0.01)
    batch = random_batch(2, 64, 3000)
    loss = model.loss(batch, attention_masks(model, batch.starts, (63, 63)))[1] / (batch.targets >= 0).sum()
    assert loss.item() == pytest.approx((1536 / 3) ** 0.5, rel=0.02)


def test_xl_sees_over_the_borders_of_documents():
    model, batch = small_model(preset="gpt2-xl", spread=0.3), random_batch(1, 64)
    with torch.no_grad():
        found = [model(batch.inputs, starts, attention_masks(model, starts, (63, 63)))
                 for starts in (batch.starts, torch.zeros_like(batch.starts))]
    assert batch.starts.any() and torch.equal(*found)


# ---- both ------------------------------------------------------------------------------------------------------------

SIBLINGS = {  # all that is scaled down
    "gpt2-medium": dict(width=32, heads=2, steps=26, extension=2 / 26, tokens_per_step="256,512,768,1024",
                        row_tokens="128,256,384,512", window="16,32,48,56,64,72,80,88,96",
                        window_short="8,16,24,28,32,36,40,44,48", window_final=120, document_tokens=200, muon_lr=0.05,
                        adam_head="0.03,0.8,0.95,0", adam_embedding="0.03,0.8,0.95,0"),
    "gpt2-xl": dict(width=64, heads=2, layers=8, steps=30, tokens_per_step=1024, row_tokens=128, val_row_tokens=128,
                    window=127, tied_init=(3 * 64) ** -0.5, muon_lr=0.05, adam_head="0.01,0.9,0.95,0")}


@pytest.mark.parametrize("preset", SIBLINGS)
def test_a_sibling_trains(preset, tmp_path):
    sizes = dict(val_every=0, val_tokens=2000, val_row_tokens=512, device="cpu", dtype="float32", compile="none")
    folder = write_corpus(tmp_path / "corpus", train=(60_000,))
    run = run_here(folder, base=sizes | {"preset": preset} | SIBLINGS[preset])
    validated = losses(run, "val_loss")
    assert len(losses(run)) == metrics(run)[-1]["step"] and all(map(math.isfinite, losses(run)))
    assert validated[-1] < 3.3 < 4.5 < validated[0], validated  # tokens by their frequencies alone have 3.3


@pytest.mark.parametrize("preset", SIBLINGS)
@pytest.mark.parametrize("world", [1, 4])
def test_memory_of_weights_and_optimizers_is_predicted_to_the_byte(preset, world, monkeypatch):
    monkeypatch.setattr("train_gpt2.dist.broadcast", lambda *_: None)
    model = small_model(preset=preset, dtype=torch.bfloat16)
    groups = optimizer_groups(model, model.config, torch.bfloat16, Processes(0, world, ALONE.device)).values()
    predicted = timing.predicted_memory(model.config, 50, torch.bfloat16, world, ALONE.device)
    settings = [group.settings if hasattr(group, "settings") else group.scale for group in groups]
    assert predicted["weights"] == sum(group.weights.nbytes for group in groups)
    assert predicted["optimizer"] == sum(t.nbytes for group in groups for t in group.state) + sum(
        t.nbytes for t in settings)


def test_what_is_predicted_for_a_gpu():
    """The figures that the README states."""
    cuda, gib = torch.device("cuda"), 2**30
    for config, world, least, most in ((MEDIUM, 8, 45, 55), (replace(XL, micro_tokens=16_384), 8, 60, 80)):
        assert least < timing.peak_bytes(config, 50257, torch.bfloat16, world, cuda) / gib < most
    assert timing.settings_that_fit(XL, 50257, torch.bfloat16, 8, cuda, 80 * gib) == {"micro_tokens": 16_384}


def test_gates_that_a_gpus_kernels_could_not_read_are_refused():
    """They lie one after the other, each to begin on 16 bytes."""
    with pytest.raises(Refusal, match="13 is not a whole number of fours.*nearest is --gate-channels 12"):
        parse_command_line(["--gate-channels", "13"])
    for config in (Config(), MEDIUM):
        assert config.heads * config.gate_channels % 4 == 0
