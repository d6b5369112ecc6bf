"""Write a model that train_gpt2.py trained for other programs: weights, config.json, and model.py, which
loads them with torch as its only package.

    python evals/export.py logs/RUN                  # to logs/RUN/exported, or to --out FOLDER
    cd logs/RUN/exported
    python -c "import torch; from model import load; print(load().logits(torch.tensor([256])))"

No standard Hugging Face class can hold these models: none has paired heads, key offsets, value or bigram
embeddings, weights by token, ReLU^2 without biases. config.json lists what the model at hand has; model.py
is short and spells it out.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "data")]

import sample  # before torch, whose surroundings it checks
from text import Parser, typed_path
from torch import Tensor

from train_gpt2 import GPT, TECHNIQUES, Phase, UserError, comments, skip_sources

# Those of TECHNIQUES that a forward pass shows.
IN_MODEL = ("unet-skips", "qk-norm", "x0-shortcut", "value-residual", "value-embeddings", "attention-free",
            "half-rotary", "softcap", "short-windows", "attention-gates", "yarn", "smear", "gated-skip",
            "key-offset", "value-gates", "paired-heads", "bigrams", "sublayer-mixing", "attention-source", "mudd",
            "xsa", "bigram-signs")


def description(model: GPT, phase: Phase, saved: dict) -> dict:
    """config.json: what model.py needs beside the weights, as it was when the model was saved."""
    config, skips, notes = model.config, skip_sources(model.config), comments(quote='"')
    tables = {layer: number for number, layer in enumerate(sorted({*config.value_layers}))}
    layers = [{"window": phase.windows[block.short], "paired": block.paired, "key_offset": block.key_offset,
               "value_table": tables.get(i), "skip_from": skips.get(i)}
              for i, block in enumerate(model.blocks)]
    techniques = {name: notes[name].partition(") ")[2] for name in IN_MODEL
                  if all(getattr(config, key) != value for key, value in TECHNIQUES[name].items())
                  and (name, config.mixing) != ("sublayer-mixing", "none")}
    encoding = sample.KNOWN.get((saved["vocabulary"], saved["separator"]), "that of its training shards")
    return {"techniques": techniques, "encoding": encoding, "longest_text": max(config.row_tokens),
            **{name: saved[name] for name in ("vocabulary", "separator", "step", "val_loss")},
            **{name: getattr(config, name) for name in ("heads", "rms_epsilon", "qk_norm", "softcap")},
            "rotary_frequencies": model.frequencies[phase.stage].tolist(),
            "softmax_scale": model.scales[phase.stage].item(),
            "attention_source": next(iter(config.attention_source), None),
            "kept": min(skips.values(), default=None), "layers": layers}


def exported_weights(model: GPT, phase: Phase) -> dict[str, Tensor]:
    """The tensors of model.safetensors: tables without padding, weights of the entrance with their layers."""
    weights = model.state_dict()
    if phase.tied:  # one table
        del weights["embedding"]
    entrance = model.entrance
    for name, layers in (("x0_mix", entrance.x0_layers), ("bigram_mix", [0, *entrance.bigram_layers])):
        if f"entrance.{name}" in weights:
            parts = weights.pop(f"entrance.{name}")
            weights |= {f"blocks.{i}.{name}": part.clone() for i, part in zip(layers, parts, strict=True)}
    for name, weight in weights.items():  # tables of tokens are padded to a multiple of 64 rows
        by_token = name.startswith(("embedding", "head", "value_tables."))
        weights[name] = (weight[:model.vocabulary] if by_token else weight).contiguous()
    return weights


def main(arguments: list[str] | None = None) -> None:
    """The command line. Raises UserError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=sample.CHECKPOINT)
    parser.add_argument("--out", type=typed_path, metavar="DIR",
                        help="folder of the three files (default: exported, beside the checkpoint)")
    options = parser.parse_args(arguments)
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("the package safetensors is missing: pip install safetensors") from None
    model, phase, saved = sample.open_model(options.checkpoint)
    config, weights = description(model, phase, saved), exported_weights(model, phase)
    out = options.out or Path(saved["path"]).parent / "exported"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as name:  # until all are whole: older ones stay so long
            new = Path(name)
            save_file(weights, new / "model.safetensors", {"format": "pt"})
            (new / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            shutil.copymode(new / "config.json", new / "model.safetensors")  # that is for its owner alone
            shutil.copyfile(HERE / "exported_model.py", new / "model.py")
            for file in sorted(new.iterdir()):
                os.replace(file, out / file.name)
    except Exception as error:  # noqa: BLE001  safetensors has an error of its own for a full disk
        raise UserError(f"cannot write to {out}: {error!s:.200}; make room, or give another --out") from None
    numbers, trained = (sum(w.numel() for w in part.values()) for part in (weights, saved["weights"]))
    size = (out / "model.safetensors").stat().st_size
    print(f"model.safetensors, config.json and model.py of {saved['path']} are in {out}: {numbers:,} "
          f"numbers, {size / 1e6:,.1f} MB; there: from model import load; load().logits(torch.tensor([...]))")
    print(f"the trainer counts {trained:,} parameters: with tables padded from {model.vocabulary} to "
          f"{len(model.head)} rows" + ", attention's scalars apart" * model.config.attention_mix
          + ", embedding and head apart" * phase.tied)


if __name__ == "__main__":
    sample.command(main)
