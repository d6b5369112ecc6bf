"""What is done with a model after training: evals/sample.py, hellaswag.py and export.py."""

import base64
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiktoken
import torch
from safetensors.torch import load_file
from tools import ROOT, run_here, small_model, start

sys.path[:0] = [str(ROOT / "evals"), str(ROOT / "data")]

import export
import hellaswag
import sample
import text as text_script

import train_gpt2
from train_gpt2 import Progress, phase_at

BYTES, GPT2, OWN = (257, 256), (50_257, 50_256), (261, 260)  # vocabulary, separator
ROWS = {"row_tokens": (128,), "tokens_per_step": (128,), "val_row_tokens": 128}  # a file needs such
TINY = {"layers": 3, "heads": 2, "width": 32, "window": (70,), "window_short": (70,)}
RECIPES = {"five-minute": ROWS, "gpt2": ROWS, "tiny": ROWS | TINY}
PLAIN = {"value_gates": False, "mixing": "none", "qk_norm": False, "attention_mix": False, "xsa_layers": (),
         "attention_source": (), "softcap": (0.0, 1.0, 0.0), "window": (37,), "window_short": (9,)}
# Last layers: MUDD without a value table, source, bigrams; without MUDD.
BARE = {"value_layers": (1, 4), "attention_source": (), "bigram": 0, "gated_skip": (), "unet_skips": True}
STATIC = {"mudd": False, "mixing": "blocks", "bigram_signs": 0, "value_residual": True, "qk_heads": 0}
CASES = [("five-minute", 0, "float64", {}), ("tiny", 0, "float64", {}), ("gpt2", 0, "float64", {}),
         ("gpt2", 800, "float32", {}), ("gpt2", 1375, "float64", PLAIN), ("gpt2", 1000, "float64", BARE),
         ("gpt2", 1375, "float64", STATIC), ("five-minute", 0, "bfloat16", {})]
CLOSE = {"float64": 1e-10, "float32": 3e-4, "bfloat16": 0.1}


def small(recipe: str, dtype: str = "float64", vocabulary: int = 50, **changes):
    """A model of a recipe, all its parts drawn at random."""
    return small_model(vocabulary, dtype, 0.3, recipe, **RECIPES[recipe] | changes)


def document_tokens(count: int, separator: int = 49) -> torch.Tensor:
    """(1, count) int32, one separator in twenty-five."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, separator, (1, count), generator=draw)
    return torch.where(torch.rand(1, count, generator=draw) < 0.04, separator, tokens).int()


def checkpoint(path, recipe: str = "tiny", step: int = 640, dtype: str = "float32", tokens: tuple = BYTES,
               **changes):
    """A file as a run leaves it after `step` updates."""
    stream = SimpleNamespace(vocabulary=tokens[0], separator=tokens[1])
    data = SimpleNamespace(train=stream, fingerprints={})
    model, progress = small(recipe, dtype, tokens[0], **changes), Progress(step, 1.0, 1.25)
    train_gpt2.save(path, train_gpt2.contents(model, data, progress))
    return path


@torch.no_grad()
def all_logits(model, tokens: torch.Tensor, separator: int, phase) -> torch.Tensor:
    """(1, T) -> (T, V), by the forward pass of training."""
    return model.logits(model(tokens, tokens == separator, phase)[0])


def logits_of(path, tokens: torch.Tensor) -> torch.Tensor:
    """(1, T) -> (T, V), of the model in a file."""
    model, saved = train_gpt2.load_model(path)
    return all_logits(model, tokens, saved["separator"], phase_at(saved["step"], model.config))


def refused(main, *arguments) -> str:
    """The one line with which a command turns its arguments down."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert "\n" not in caught.value.code
    return caught.value.code


class Characters:
    """Stands for an encoding of tiktoken's, which need downloads: a character is a token, 0 to 127."""

    n_vocab, eot_token = GPT2

    def encode_ordinary(self, text):
        return list(text.encode("ascii"))

    def decode_single_token_bytes(self, token):
        return bytes([token])


@pytest.fixture
def characters(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: Characters())


@pytest.fixture
def own(tmp_path):
    """A tokenizer as a file: the bytes backwards, and pieces, one of them half a character."""
    tokens = [bytes([255 - i]) for i in range(256)] + [b"ing", b" the", "☃".encode()[:2], b"in"]
    path = tmp_path / "own.tiktoken"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    return path


# --------------------------------------------------------------------------------------------------
# evals/sample.py


@pytest.mark.parametrize("recipe, step, dtype, changes", CASES)
def test_logits_with_cache_and_settled_weights_are_those_without(recipe, step, dtype, changes):
    model, tokens = small(recipe, dtype, **changes), document_tokens(90)
    phase = phase_at(step, model.config)
    expected = all_logits(model, tokens, 49, phase)
    assert expected.equal(all_logits(sample.settle(model), tokens, 49, phase))
    cache, parts = sample.Cache(model, phase, 49), tokens.split([1, 1, 2, 1, 1, 64, *[1] * 20], dim=1)
    hidden = torch.cat([cache.advance(part) for part in parts], dim=1)
    torch.testing.assert_close(model.logits(hidden[0]).detach(), expected, rtol=0, atol=CLOSE[dtype])
    assert max(key.shape[2] for _, key, _ in cache.layers) <= max(phase.windows) + 6  # memory is bounded


def test_a_text_is_drawn_from_the_last_row_of_it(monkeypatch):
    model, context, own, seen = small("tiny"), document_tokens(110), sample.drawn, []
    phase, draw = phase_at(0, model.config), torch.Generator().manual_seed(3)
    case = model, phase, context[0].tolist(), 49, 30, 2.0, 7
    monkeypatch.setattr(sample, "CHUNK", 23)
    monkeypatch.setattr(sample, "drawn", lambda logits, *rest: seen.append(logits) or own(logits, *rest))
    found = list(sample.generate(*case, seed=3))
    for token, logits in zip(found, seen, strict=True):
        context = context[:, -64:] if context.shape[1] > 128 else context
        expected = all_logits(model, context, 49, phase)[-1]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
        assert token == own(expected, 2.0, 7, draw)
        context = torch.cat((context, torch.tensor([[token]], dtype=torch.int32)), dim=1)
    assert len(found) == 30 and found != list(sample.generate(*case, seed=4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_writes_the_same_text(recipe):
    model, tokens, texts = small(recipe), document_tokens(128), []
    for device in ("cpu", "cuda"):
        case = model.to(device), phase_at(0, model.config), tokens[0].tolist(), 49, 60, 0.8, 20, 5
        texts.append(list(sample.generate(*case)))
    assert texts[0] == texts[1]


def test_draws_follow_the_chances():
    logits, draw = torch.tensor([2.0, 1.0, 0.0, -9.0, 1.5]), torch.Generator().manual_seed(0)
    for temperature, top_k, left_out in (
            (0.5, 0, []), (2.0, 3, [2, 3]), (1.0, 1, [1, 2, 3, 4]), (1.0, 99, [])):
        drawn = [sample.drawn(logits, temperature, top_k, draw) for _ in range(2000)]
        chances, found = (logits / temperature).exp(), torch.tensor(drawn).bincount(minlength=5) / 2000
        chances[left_out] = 0
        torch.testing.assert_close(found, chances / chances.sum(), rtol=0, atol=0.035)
        assert not found[left_out].any()
    assert sample.drawn(logits, 0, 0, draw) == sample.drawn(logits, 1e-310, 0, draw) == 0


def test_several_prompts_are_told_apart_and_each_has_its_seed(tmp_path, capsys):
    path = checkpoint(tmp_path / "model.pt")

    def written(*options):
        sample.main([str(path), "--tokens", "20", "--device", "cpu", *options])
        return capsys.readouterr()

    both = written("--prompt", "To be", "--prompt", "def", "--seed", "5")
    first, second = both.out.split("\n" + "-" * 72 + "\n")
    assert first.startswith("To be") and second.startswith("def")
    assert both.err.startswith("40 tokens in ") and str(path) in both.err
    others = [written("--prompt", "def", "--seed", seed).out for seed in ("6", "7")]
    assert others[0] == second != others[1]
    assert written("--top-k", "1").out == written("--temperature", "0").out


def test_text_and_tokens_are_those_of_the_encoding(own, tmp_path, monkeypatch, characters):
    path, prompts, written = checkpoint(tmp_path / "model.pt", tokens=OWN), [], []
    drawn = [255 - ord("a"), 258, 255 - 0x83, OWN[1], 259, 0, 255 - 0xC3]  # two are no characters
    monkeypatch.setattr(sample, "generate", lambda *case: iter(prompts.append(case[2]) or drawn))
    monkeypatch.setattr("builtins.print", lambda text="", end="\n", **_: written.append(text + end))
    sample.main([str(path), "--encoding", str(own), "--prompt", "ring the☃"])
    assert prompts == [[260, 255 - ord("r"), 256, 257, 258, 255 - 0x83]]
    pieces = ["ring the☃", "a", "", "☃", "\n\n", "in", "\ufffd", "", "\ufffd\n"]  # as soon as whole
    assert written[:-1] == pieces
    for sizes, text, expected in ((GPT2, "Hi", b"Hi"), (BYTES, "é\udcff", b"\xc3\xa9\xff")):
        encoding = sample.encoding_of({"vocabulary": sizes[0], "separator": sizes[1]})
        assert b"".join(map(encoding.decode, encoding.encode(text).tolist())) == expected


def test_an_encoding_must_be_that_of_the_model(own, tmp_path, characters):
    path, other = checkpoint(tmp_path / "model.pt", tokens=OWN), tmp_path / "other.pt"
    for command in (sample.main, hellaswag.main):
        assert "--encoding" in refused(command, path)
        line = refused(command, path, "--encoding", "gpt2")
        assert all(str(size) in line for size in (*GPT2, *OWN))
        for sizes in ((261, 0), (300, 260)):
            line = refused(command, checkpoint(other, tokens=sizes), "--encoding", own)
            assert all(str(size) in line for size in (*sizes, *OWN))


def test_an_own_tokenizer_goes_through_shards_training_and_evaluation(own, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("sing the song, bring the string ☃ <|endoftext|>\n" * 200)
    text_script.main([str(tmp_path / "text.txt"), "--out", str(tmp_path), "--encoding", str(own)])
    run = run_here(tmp_path, steps=2, layers=2, width=32, repeat=True)
    saved = train_gpt2.load_model(run / "model.pt")[1]
    assert (saved["vocabulary"], saved["separator"]) == OWN
    texts = set()
    for place in (run, run / "model.pt", tmp_path / "logs"):
        capsys.readouterr()
        sample.main([str(place), "--encoding", str(own), "--prompt", "bring ☃", "--tokens", "9"])
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1 and texts.pop().startswith("bring ☃")
    items = write_items(tmp_path / "items.jsonl", random_items(5))
    hellaswag.main([str(run), "--encoding", str(own), "--file", str(items)])
    assert "5 of 5 items" in capsys.readouterr().out


def test_a_folder_stands_for_its_model_or_newest_whole_checkpoint_or_newest_run(tmp_path):
    old, new = tmp_path / "20260101-000000-ffff", tmp_path / "20260102-000000-0000"
    for folder in (old, new, tmp_path / "compile_cache"):
        folder.mkdir()
    for path in (old / "model.pt", new / "checkpoint_0000002.pt", new / "checkpoint_0000004.pt", new / "model.pt"):
        checkpoint(path)
    expected = [*sorted(new.iterdir(), reverse=True), old / "model.pt"]
    for path in expected[:-1]:
        assert sample.model_file(tmp_path) == sample.model_file(new) == path
        path.write_bytes(path.read_bytes()[:-100])
    assert sample.model_file(tmp_path) == sample.model_file(old) == expected[-1]
    assert "model.pt" in refused(sample.main, new)
    for command in (sample.main, hellaswag.main, export.main):
        assert "model.pt" in refused(command, tmp_path / "compile_cache")
        assert "none.pt" in refused(command, tmp_path / "none.pt")


def test_sample_refuses_what_it_cannot_do(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "model.pt", "five-minute", tokens=GPT2)
    for option, value in (("--tokens", 0), ("--temperature", -1), ("--temperature", "nan"), ("--top-k", -1),
                          ("--seed", -1), ("--tokens", "many")):
        line = refused(sample.main, path, option, value)
        assert option in line and str(value) in line
    if not torch.cuda.is_available():
        assert "--device cpu" in refused(sample.main, path, "--device", "cuda")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: 1 / 0)  # stands for a dead network
    assert "TIKTOKEN_CACHE_DIR" in refused(sample.main, path)


def test_a_closed_pipe_and_a_terminal_of_ascii_end_in_no_traceback(tmp_path):
    call = [sys.executable, ROOT / "evals/sample.py", checkpoint(tmp_path / "model.pt"), "--prompt", "é"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout.read(1) == b"?"
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == -signal.SIGPIPE


# --------------------------------------------------------------------------------------------------
# evals/hellaswag.py


def random_items(count: int) -> list[dict]:
    """Records as the set has them, with texts of many lengths."""
    draw = random.Random(0)
    texts = [["".join(draw.choices("abcdefgh ", k=draw.randint(1, most))) for most in (150, 30, 30, 30, 30)]
             for _ in range(count)]
    return [{"ind": i, "ctx": context, "endings": endings, "label": draw.randrange(4)}
            for i, (context, *endings) in enumerate(texts)]


def write_items(path, items: list[dict]):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def brute_force(path, item: dict) -> torch.Tensor:
    """(4, 2), sum and mean of each ending's loss, one row at a time, without padding."""
    losses = []
    for ending in item["endings"]:
        tokens = list((" " + ending).encode())[:127]
        text = torch.tensor([BYTES[1], *item["ctx"].encode()][-(128 - len(tokens)):] + tokens)
        logits, own = logits_of(path, text[None].int())[-len(tokens) - 1:-1], text[-len(tokens):, None]
        loss = logits.logsumexp(1) - logits.gather(1, own)[:, 0]
        losses.append(torch.stack((loss.sum(), loss.mean())))
    return torch.stack(losses)


def test_accuracy_is_that_of_a_brute_force_scorer(tmp_path, capsys, monkeypatch):
    items, scored, losses = random_items(9), [], hellaswag.ending_losses
    items[0]["ctx"] *= 9  # longer than a row, as an ending
    items[1]["endings"][2] = "abc " * 40
    path = checkpoint(tmp_path / "model.pt", "five-minute", dtype="float64", window=(127,))
    monkeypatch.setattr(hellaswag, "ending_losses", lambda *case: scored.append(losses(*case)) or scored[-1])
    monkeypatch.setattr(hellaswag, "LOGITS_AT_ONCE", 50)
    file = write_items(tmp_path / "items.jsonl", items)
    hellaswag.main([str(path), "--file", str(file), "--batch", "2", "--encoding", "bytes"])
    expected = [brute_force(path, item) for item in items]
    found, wanted = (torch.cat(part).sort(0)[0] for part in (scored, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert list(map(len, scored)) == [8] * 4 + [4]
    rates = [sum(int(four[:, kind].argmin()) == item["label"] for four, item in zip(expected, items)) / 9
             for kind in (0, 1)]
    assert rates[0] != rates[1]  # or the test could not tell one from the other
    raw, normalised = (f"{100 * p:.2f} % ± {100 * math.sqrt(p * (1 - p) / 9):.2f}" for p in rates)
    assert f"9 of 9 items: {raw} raw, {normalised} length-normalised" in capsys.readouterr().out


def test_gpt2s_figures_compare_with_its_own_tokens_alone(tmp_path, capsys, monkeypatch, characters):
    path = checkpoint(tmp_path / "model.pt", "five-minute", tokens=GPT2)
    items, seen = random_items(40), []

    def accuracies(_model, _phase, some, *_):
        seen[:] = [item.context for item in some]
        return torch.ones(len(some), 2)

    monkeypatch.setattr(hellaswag, "accuracies", accuracies)
    call = [str(path), "--file", str(write_items(tmp_path / "items.jsonl", items))]
    for encoding, compares in (("gpt2", True), ("r50k_base", True), ("p50k_base", False)):  # of one size here
        hellaswag.main([*call, "--encoding", encoding])
        result, compared = capsys.readouterr().out.splitlines()
        assert "40 of 40 items: 100.00 % ± 0.00 raw" in result
        assert "28.59 % raw, 29.55 %" in compared and ("do not compare" in compared) != compares
    hellaswag.main([*call, "--limit", "4"])
    assert seen == [items[i]["ctx"] for i in (0, 10, 20, 30)]


def test_the_set_is_fetched_once_and_read_as_parquet(tmp_path, monkeypatch):
    items, asked = random_items(3), []

    def download(repository, name, local_dir, **options):
        asked.append((repository, name, options))
        (local_dir / name).parent.mkdir(parents=True)
        (local_dir / name).write_bytes(b"PAR1" + json.dumps(items).encode())
        return local_dir / name

    def read_table(path, columns):  # stands for pyarrow; labels are texts in the set
        rows = [{name: row[name] for name in columns} for row in json.loads(path.read_bytes()[4:])]
        return SimpleNamespace(to_pylist=lambda: [row | {"label": str(row["label"])} for row in rows])

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    pyarrow = SimpleNamespace(parquet=SimpleNamespace(read_table=read_table))
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    first, second = hellaswag.fetched(tmp_path), hellaswag.fetched(tmp_path)
    place = {"repo_type": "dataset", "revision": hellaswag.REVISION, "token": False}
    assert asked == [(hellaswag.REPOSITORY, hellaswag.FILE, place)] and first == second
    marked = [item | {"ctx": "\ufeff" + item["ctx"], "endings": ["\ufeff" + text for text in item["endings"]]}
              for item in items]  # byte-order marks, which are no text
    lines = write_items(tmp_path / "items.jsonl", marked)
    lines.write_bytes(b"\xef\xbb\xbf" + lines.read_bytes())
    assert hellaswag.read_items(first) == hellaswag.read_items(lines)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(lambda _: hellaswag.read_items(first))


def test_hellaswag_refuses_what_it_cannot_score(tmp_path, monkeypatch):
    path, file, (good,) = checkpoint(tmp_path / "bytes.pt"), tmp_path / "items.jsonl", random_items(1)
    assert "--encoding" in refused(hellaswag.main, path)
    for option, value in (("--limit", -1), ("--batch", 0)):
        assert f"{option} {value}" in refused(hellaswag.main, path, option, value)
    assert "--file" in refused(lambda _: hellaswag.read_items(tmp_path / "none.jsonl"))
    os.mkfifo(tmp_path / "pipe")
    assert "--file" in refused(lambda _: hellaswag.read_items(tmp_path / "pipe"))
    line = json.dumps(good)
    for bad in ({"endings": ["a", "b", "c"]}, {"label": 4}, {"label": ""}, {"label": True}, {"ctx": None},
                {"endings": "abcd"}, {"endings": [1, 2, 3, 4]}, {"ctx": "\ud800"},
                {"endings": ["a", "b", "c", "\udfff"]},
                line.replace('"label": ', '"label": 1e999'), "[]", "{", "[" * 100_000, "\xff"):
        text = bad if type(bad) is str else json.dumps(good | bad)
        file.write_text(f"{line}\n{text}\n", encoding="latin-1")
        assert f"item 2 of {file}" in refused(lambda _: hellaswag.read_items(file))
    file.write_text("")
    assert "--file" in refused(lambda _: hellaswag.read_items(file))

    def unreachable(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    line = refused(lambda _: hellaswag.fetched(tmp_path))
    assert hellaswag.REPOSITORY in line and "no network" in line and "--file" in line


# --------------------------------------------------------------------------------------------------
# evals/export.py

LOADER = """
import sys
others = ("train_gpt2", "sample", "numpy", "safetensors", "tqdm", "tiktoken")
sys.modules |= dict.fromkeys(others)  # an import of one fails
import torch
cases = torch.load(sys.argv[1])
sys.path.insert(0, cases[0][0])
import model
for folder, tokens, expected, close in cases:
    for model.BLOCK, count in ((512, 128), (48, 128), (16, 1)):
        logits = model.load(folder).logits(tokens[:count])
        assert logits.shape == expected[:count].shape and logits.dtype == expected.dtype
        worst = float((logits - expected[:count]).abs().max())
        assert worst <= close, (folder, count, worst)
print("equal")
"""


def test_an_exported_model_gives_the_same_logits_in_a_clean_process(tmp_path):
    cases, tokens = [], document_tokens(128, BYTES[1])
    for number, (recipe, step, dtype, changes) in enumerate(CASES):
        path, folder = tmp_path / f"{number}.pt", tmp_path / f"deep/{number}"
        checkpoint(path, recipe, step, dtype, **changes)
        export.main([str(path), "--out", str(folder)])
        cases.append((str(folder), tokens[0], logits_of(path, tokens), CLOSE[dtype]))
    torch.save(cases, tmp_path / "cases.pt")
    done = start(["-I", "-c", LOADER, tmp_path / "cases.pt"], cwd=tmp_path)
    assert done.stdout == "equal\n", done.stderr


def test_the_files_hold_what_they_say(tmp_path, capsys):
    path = checkpoint(tmp_path / "model.pt", "gpt2", 0, "bfloat16", smear=False, mixing="none")
    export.main([str(path)])
    folder, output = tmp_path / "exported", capsys.readouterr().out
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.py", "model.safetensors"]
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    spec = importlib.util.spec_from_file_location("exported_model_of_a_test", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = json.loads((folder / "config.json").read_text())
    library, own = load_file(folder / "model.safetensors"), module.read_tensors(folder)
    assert own.keys() == library.keys()
    assert all(own[name].dtype == library[name].dtype and own[name].equal(library[name]) for name in library)
    assert "embedding" not in library and config["step"] == 0  # one table so far
    assert library["head"].shape == library["value_tables.2"].shape == (257, 32)  # unpadded
    assert [config[name] for name in ("vocabulary", "separator", "val_loss")] == [*BYTES, 1.25]
    has = config["techniques"].keys()
    assert {"paired-heads", "bigrams", "mudd"} <= has
    assert has.isdisjoint(("smear", "value-residual", "sublayer-mixing", "prefix-loss"))
    for tensors in (library, train_gpt2.load_model(path)[1]["weights"]):
        assert f"{sum(w.numel() for w in tensors.values()):,}" in output
    assert "257 to 320 rows" in output  # why the two differ
    for wrong in ([], [257], [-1], [[1, 2]]):
        with pytest.raises(ValueError, match="256"):
            module.load(folder).logits(torch.tensor(wrong, dtype=torch.int64))


def test_export_names_a_folder_that_the_terminal_cannot_show(tmp_path):
    path = checkpoint(tmp_path / "model.pt")
    done = start([ROOT / "evals/export.py", path, "--out", tmp_path / "é"], env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and f"{tmp_path}/\\xe9:" in done.stdout


def test_weights_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    contents = train_gpt2.contents

    def spoilt(model, *rest):
        model.head.data[3, 3] = math.nan
        return contents(model, *rest)

    monkeypatch.setattr(train_gpt2, "contents", spoilt)
    path = checkpoint(tmp_path / "model.pt")
    for command in (sample.main, hellaswag.main, export.main):
        assert "in head that are not finite" in refused(command, path)


def test_export_refuses_what_it_cannot_write(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "model.pt")
    assert "--out" in refused(export.main, path, "--out", path)
    export.main([str(path), "--out", str(out := tmp_path / "out")])
    before, other = {file: file.read_bytes() for file in out.iterdir()}, checkpoint(tmp_path / "other.pt", step=1)
    with monkeypatch.context() as patch:  # a disk that is full when the weights are written: the older files stay
        patch.setattr(export.shutil, "copyfile", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        assert "No space left" in refused(export.main, other, "--out", out)
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    shutil.rmtree(out)
    other.unlink()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refused(export.main, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
