"""Write a trained model for other programs: model.safetensors, config.json and model.py, which loads them with torch
as its only package.

    python evals/export.py logs/RUN/model.pt                 # to logs/RUN/exported, or to --out FOLDER
    cd logs/RUN/exported && python -c "import torch; from model import load; print(load().logits(torch.tensor([256])))"

No standard Hugging Face class can hold these models. What the classes lack, of that which a preset may use: attention
heads in pairs, keys offset by a token, embeddings added to values, values of layer 0 mixed into later ones, gates on
heads, layers that are an MLP only, embeddings of token pairs, smear, the embedding mixed back into the stream, skips
between layers, backout, a shifted soft cap, ReLU^2 in an MLP of two matrices without biases, norms without a gain.
config.json lists those of the model at hand under "no_standard_class"; model.py is short and spells out each.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import sample

import train_gpt2 as script
from train_gpt2 import GPT, Refusal

ENCODINGS = {(sample.BYTES_VOCABULARY, sample.BYTES_SEPARATOR): "bytes: a token is a byte of UTF-8",
             (script.GPT2_VOCABULARY, script.GPT2_SEPARATOR): "gpt2: that of tiktoken.get_encoding('gpt2')"}


def unusual(model: GPT) -> list[str]:
    """What the model does that no standard class does, in plain words."""
    config, plan = model.config, model.plan
    found = {
        "MLP of two matrices with ReLU^2 and no biases, norms without a gain": True,
        "queries and keys normalised without a gain": config.qk_norm,
        "heads that attend in pairs over two positions for each token": any(layer.paired for layer in plan),
        "keys whose still channels come from the token before": any(layer.offset for layer in plan),
        "rotary embedding with frequencies of its own": config.yarn > 0 or config.rotary_share < 1,
        "attention heads that a gate can close": config.attention_gates,
        "layers without attention": bool(config.attention_free),
        "embeddings of the token added to attention's values": bool(config.value_layers),
        "values of layer 0 mixed into those of later layers": config.value_residual,
        "hashed embeddings of token pairs, added in every layer": config.bigram > 0,
        "a second embedding of the token added in every layer": config.second_embedding,
        "embeddings that take up a share of the one before": config.smear,
        "the embedding mixed back into the stream in every layer": config.x0_shortcut,
        "outputs of early layers added before later ones": bool(model.skips),
        "a middle layer's output in part subtracted at the end": bool(config.backout),
        "logits capped by tanh with a shift": config.softcap[0] > 0 and config.softcap[2] != 0,
        "attention that stays within a document of the row": config.document_mask}
    return [words for words, used in found.items() if used]


def description(model: GPT, saved: dict) -> dict:
    """config.json: all that model.py needs beside the weights; schedules are resolved to the state that was saved."""
    config, separator = model.config, saved["separator"]
    windows = script.windows_at(saved["step"], config)
    frequencies, _ = script.yarn_schedule(model.stage, config)
    layers = [{"attends": layer.attends, "window": windows[layer.short], "paired": layer.paired,
               "key_offset": layer.offset, "value_table": layer.table, "skip_from": model.skips.get(i),
               "skip_weight": list(model.skips).index(i) if i in model.skips else None}
              for i, layer in enumerate(model.plan)]
    return {
        "no_standard_class": unusual(model),
        "encoding": ENCODINGS.get((model.vocabulary, separator), "unknown: that of the shards it was trained on"),
        "vocabulary": model.vocabulary, "separator": separator, "width": config.width, "heads": config.heads,
        "longest_text": max(config.row_tokens), "dtype": str(model.dtype)[6:], "step": saved["step"],
        "val_loss": saved.get("val_loss"), "rms_epsilon": config.rms_epsilon, "tied": model.tied,
        "looks_over_documents": config.cross_document, "attends_over_documents": not config.document_mask,
        "smear": config.smear, "bigram": config.bigram > 0, "second_embedding": config.second_embedding,
        "embedding_norm": config.embedding_norm,
        "embedding_shortcut": config.x0_shortcut, "gated_skip": bool(config.gated_skip),
        "backout": config.backout[0] if config.backout else None, "softcap": config.softcap, "qk_norm": config.qk_norm,
        "value_residual": config.value_residual, "value_gates": config.value_gates,
        "attention_gates": config.attention_gates, "rotary_frequencies": frequencies.tolist(),
        "softmax_scale": float(model.scale), "layers": layers}


def tensors(model: GPT) -> dict[str, Tensor]:
    """The weights by name, as a pass uses them, without the padding rows of tables and without an embedding table that
    is the head."""
    by_token = ("embedding", "head", "value_tables.", "second_table")
    return {name: (weight[:model.vocabulary] if name.startswith(by_token) else weight).contiguous()
            for name, weight in sample.settle(model).state_dict().items() if name != "embedding" or not model.tied}


def main(arguments: list[str] | None = None) -> None:
    """Command line. Raises Refusal for a file that is no checkpoint, a folder that cannot be, a missing package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run folder, or model.pt or checkpoint_*.pt in one")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="folder of the three files (default: exported, beside the checkpoint)")
    options = parser.parse_args(arguments)
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise Refusal("the package safetensors is missing, expected by this command alone: "
                      "pip install safetensors") from None
    checkpoint = sample.model_file(options.checkpoint)
    model, saved = script.load_model(checkpoint)
    config, weights = description(model, saved), tensors(model)
    out = options.out or checkpoint.parent / "exported"
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(weights, out / "model.safetensors", {"format": "pt"})
        (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        shutil.copymode(out / "config.json", out / "model.safetensors")  # which is readable to its owner alone
        shutil.copyfile(HERE / "exported_model.py", out / "model.py")
    except Exception as error:  # noqa: BLE001  safetensors has an error of its own for a full disk
        raise Refusal(f"cannot write to {out}: {' '.join(str(error).split())[:200]}; make room there, or name another "
                      "folder with --out") from None
    count, size = (sum(each) for each in zip(*((w.numel(), w.nbytes) for w in weights.values()), strict=True))
    print(f"model.safetensors, config.json and model.py in {out}: {count:,} numbers, {size / 1e6:,.1f} MB; load them "
          "there with: from model import load; load().logits(torch.tensor([...]))")
    print("no standard Hugging Face class has: " + "; ".join(config["no_standard_class"]))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
