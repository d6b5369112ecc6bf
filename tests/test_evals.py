"""What is done with a model after training: evals/sample.py, hellaswag.py and export.py."""

import base64
import importlib.util
import json
import math
import random
import re
import sys
import types

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
from train_gpt2 import Refusal, TokenStream

BYTES = {"vocabulary": 257, "separator": 256}
GPT2 = {"vocabulary": 50_257, "separator": 50_256}
# Every recipe with rows of 128, so that its file is one that load_model takes.
RECIPES = {
    "five-minute": {"preset": "five-minute", "row_tokens": (128,), "val_row_tokens": 128},
    **{preset: {"preset": preset, "row_tokens": (128,), "val_row_tokens": 128}
       for preset in ("gpt2", "gpt2-medium", "gpt2-xl")},
    "tiny": {"preset": "tiny", "layers": 3, "heads": 2, "width": 32, "row_tokens": (128,), "val_row_tokens": 128,
             "window": (70,), "window_short": (70,)}}
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-4}


def texts(rows: int, count: int, separator: int, seed: int = 0) -> torch.Tensor:
    """(rows, count) int32 tokens up to the separator, which is one in twenty-five."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, separator, (rows, count), generator=draw)
    return torch.where(torch.rand(rows, count, generator=draw) < 0.04, separator, tokens).int()


def checkpoint(path, recipe: str = "tiny", step: int | None = None, dtype=torch.float32, tokens: dict = BYTES,
               **changes):
    """Write a file as a run of this recipe leaves it after `step` steps, all parts of the model drawn at random."""
    model = small_model(tokens["vocabulary"], dtype, 0.3, **RECIPES[recipe], **changes)
    step = model.config.steps if step is None else step
    train_gpt2.save_model(path, model, types.SimpleNamespace(**tokens, fingerprint={}), step, 1.25)
    return path


def expected_logits(path, tokens: torch.Tensor, loaded: tuple | None = None) -> torch.Tensor:
    """What the model in a file makes of (T,) tokens, through the forward pass of training."""
    model, saved = loaded or train_gpt2.load_model(path)
    windows = train_gpt2.windows_at(saved["step"], model.config)
    with torch.no_grad():
        return model.logits(sample.all_hidden(model, tokens[None], saved["separator"], windows)[0])


def refused(main, *arguments) -> str:
    """The one line with which a command turns its arguments down."""
    with pytest.raises(Refusal) as caught:
        main([str(argument) for argument in arguments])
    assert "\n" not in caught.value.code
    return caught.value.code


class Characters:
    """Stands for tiktoken's GPT-2 encoding, which needs a download: a character is a token, 0 to 127."""

    n_vocab, eot_token = GPT2.values()

    def encode_ordinary(self, text):
        return list(text.encode("ascii"))

    def decode_single_token_bytes(self, token):
        return bytes([token % 128])


@pytest.fixture
def characters(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": Characters()}.__getitem__)


# ----------------------------------------------------------------------------------------------------------------------
# evals/sample.py


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("recipe, step, changes", [
    ("five-minute", 0, {}), ("tiny", 0, {}), ("tiny", 0, {"cross_document": False}), ("gpt2", 0, {}),
    ("gpt2-medium", 0, {}), ("gpt2-medium", 4740, {}), ("gpt2-xl", 0, {}),
    ("gpt2", 800, {"cross_document": False}), ("gpt2", 1600, {}), ("gpt2", 1600, {"value_gates": False,
                                                                                 "x0_shortcut": False, "window": (37,),
                                                                                 "window_short": (9,)})])
def test_logits_with_the_cache_are_those_without_at_every_position(recipe, step, changes, dtype):
    model = small_model(50, dtype, 0.3, **RECIPES[recipe] | changes)
    model.tied = step - 1 <= train_gpt2.last_tied_step(model.config)
    model.enter_stage(train_gpt2.stage_of(step, model.config))
    windows, tokens = train_gpt2.windows_at(step, model.config), texts(2, 128, 49)
    with torch.no_grad():
        expected = model.logits(sample.all_hidden(model, tokens, 49, windows))
        for parts in ([1] * 128, [1, 50, 1, 1, 3, 72], [128]):
            cache = sample.Cache(model, 2, windows)
            found = model.logits(torch.cat([cache.advance(part, 49) for part in tokens.split(parts, dim=1)], dim=1))
            torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE[dtype])
    kept = [past["key"].shape[1] for past in cache.layers if past is not None]
    assert max(kept) <= max(windows)  # memory does not grow with the text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_settling_the_weights_leaves_the_logits_to_the_bit(recipe, dtype):
    model, tokens = small_model(50, dtype, 0.3, **RECIPES[recipe]), texts(1, 60, 49)
    windows = train_gpt2.windows_at(0, model.config)
    with torch.no_grad():
        before = model.logits(sample.all_hidden(model, tokens, 49, windows))
        after = model.logits(sample.all_hidden(sample.settle(model), tokens, 49, windows))
    assert before.equal(after)
    assert {model.head.dtype, *(block.mlp.dtype for block in model.blocks)} == {dtype}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_text_is_the_same_with_and_without_the_cache_beyond_a_row(recipe, monkeypatch):
    monkeypatch.setattr(sample, "CHUNK", 23)
    model = small_model(50, torch.float64, 0.3, **RECIPES[recipe])
    prompt, windows = texts(1, 200, 49)[0].tolist(), train_gpt2.windows_at(0, model.config)
    case = model, prompt, 49, windows, 90, 0.8, 0
    cached, other = (list(sample.generate(*case, seed=seed, cached=True)) for seed in (3, 4))
    assert cached == list(sample.generate(*case, seed=3, cached=False))
    assert cached != other
    assert len(cached) == 90


def test_the_context_is_what_the_next_token_is_drawn_from():
    model = small_model(50, torch.float64, 0.3, **RECIPES["tiny"])
    windows, prompt = (70, 70), texts(1, 128, 49)[0].tolist()
    found, context = list(sample.generate(model, prompt, 49, windows, 70, 0)), prompt
    for token in found:
        context = context[-64:] if len(context) > 128 else context
        hidden = sample.all_hidden(model, torch.tensor([context], dtype=torch.int32), 49, windows)
        assert token == int(model.logits(hidden[0, -1]).argmax())
        context = [*context, token]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_writes_the_same_text(recipe):
    model, tokens, written, logits = small_model(50, torch.float64, 0.3, **RECIPES[recipe]), texts(2, 128, 49), [], []
    windows = train_gpt2.windows_at(0, model.config)
    for device in ("cpu", "cuda"):
        model.to(device)
        logits.append(model.logits(sample.Cache(model, 2, windows).advance(tokens.to(device), 49)).detach().cpu())
        written.append(list(sample.generate(model, tokens[0].tolist(), 49, windows, 60, 0.8, 20, 5)))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-10)
    assert written[0] == written[1]


def test_draws_follow_the_chances():
    logits, draw = torch.tensor([2.0, 1.0, 0.0, -9.0, 1.5]), torch.Generator().manual_seed(0)
    for temperature, top_k in ((1.0, 0), (0.5, 0), (2.0, 3), (1.0, 1), (1.0, 99)):
        drawn = torch.tensor([sample.drawn(logits, temperature, top_k, draw) for _ in range(2000)])
        chances = (logits / temperature).exp()
        if top_k == 3:
            chances[2:4] = 0
        if top_k == 1:
            chances[1:] = 0
        found = drawn.bincount(minlength=5) / 2000
        torch.testing.assert_close(found, chances / chances.sum(), rtol=0, atol=0.035)
        assert found[chances == 0].sum() == 0
    assert sample.drawn(logits, 0, 0, draw) == sample.drawn(logits, 1e-310, 0, draw) == 0


def test_several_prompts_are_told_apart_and_each_has_its_seed(tmp_path, capsys, monkeypatch):
    path = checkpoint(tmp_path / "model.pt")
    arguments = [str(path), "--tokens", "30", "--device", "cpu"]
    sample.main([*arguments, "--prompt", "To be", "--prompt", "def", "--seed", "5"])
    both = capsys.readouterr()
    first, second = both.out.split("\n" + "-" * 72 + "\n")
    assert first.startswith("To be") and second.startswith("def")
    assert both.err.startswith("60 tokens in ") and both.err.endswith(" tokens/s on cpu in float32, with cache\n")
    sample.main([*arguments, "--prompt", "def", "--seed", "6"])
    assert capsys.readouterr().out == second
    with monkeypatch.context() as without:
        without.setattr(sample, "Cache", None)
        sample.main([*arguments, "--prompt", "def", "--seed", "6", "--no-cache"])
    again = capsys.readouterr()
    assert again.out == second and again.err.endswith("without cache\n")
    sample.main([*arguments, "--prompt", "def", "--seed", "7"])
    assert capsys.readouterr().out != second
    sample.main([*arguments, "--prompt", "def", "--seed", "7", "--top-k", "1"])
    one = capsys.readouterr().out
    sample.main([*arguments, "--prompt", "def", "--temperature", "0"])
    assert capsys.readouterr().out == one


def test_bytes_that_are_half_a_character_wait_for_the_rest(tmp_path, capsys, monkeypatch):
    path, written = checkpoint(tmp_path / "model.pt"), []
    tokens = [*"é☃".encode(), 256, *"\U0001f600".encode(), 0xFF, 0xC3]
    monkeypatch.setattr(sample, "generate", lambda *_: iter(tokens))
    monkeypatch.setattr("builtins.print", lambda text="", end="\n", **_: written.append(text + end))
    sample.main([str(path), "--prompt", "a", "--tokens", str(len(tokens))])
    assert "".join(written[:-1]) == "aé☃\n\n\U0001f600\ufffd\ufffd\n"  # the last byte has no rest
    pieces = [piece for piece in written[:-2] if piece]
    assert pieces == ["a", "é", "☃", "\n\n", "\U0001f600", "\ufffd"]  # each as soon as it is whole


def test_a_checkpoint_is_read_with_the_windows_of_its_step(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sample, "generate", lambda *arguments: iter(seen.append(arguments[3]) or [65]))
    for step, windows in ((0, (24, 8)), (600, (40, 16)), (1600, (120, 32))):
        sample.main([str(checkpoint(tmp_path / "model.pt", "gpt2", step)), "--tokens", "1"])
        assert seen[-1] == windows


def test_gpt2_tokens_become_text_again(tmp_path, capsys, characters):
    path = checkpoint(tmp_path / "model.pt", "five-minute", tokens=GPT2)
    sample.main([str(path), "--prompt", "Hello", "--tokens", "5"])
    assert capsys.readouterr().out.startswith("Hello")
    encode, decode = sample.encoding_of(*GPT2.values())
    assert b"".join(map(decode, encode("Hi"))) == b"Hi"
    encode, decode = sample.encoding_of(*BYTES.values())
    assert b"".join(map(decode, encode("é\udcff"))) == b"\xc3\xa9\xff"  # as the terminal hands over bytes


@pytest.fixture
def own(tmp_path):
    """A tokenizer as a file: the bytes in an order of their own, and a few pieces, one of them half a character."""
    tokens = [bytes([255 - i]) for i in range(256)] + [b"ing", b" the", "☃".encode()[:2], b"in"]
    path = tmp_path / "own.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)))
    return path


OWN = {"vocabulary": 261, "separator": 260}


def test_text_of_an_own_tokenizer_goes_through_shards_training_and_samples(own, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("sing the song, bring the string ☃ <|endoftext|>\n" * 200)
    text_script.main([str(tmp_path / "text.txt"), "--out", str(tmp_path), "--encoding", str(own)])
    stream = TokenStream(str(tmp_path / "text_train_*.bin"))
    assert {"vocabulary": stream.vocabulary, "separator": stream.separator} == OWN
    run = run_here(tmp_path, steps=2, layers=2, width=32, repeat=True)
    saved = train_gpt2.load_model(run / "model.pt")[1]
    assert {name: saved[name] for name in OWN} == OWN
    capsys.readouterr()
    arguments = ["--encoding", str(own), "--prompt", "bring the ☃", "--tokens", "20", "--device", "cpu"]
    sample.main([str(run), *arguments])
    written = capsys.readouterr().out
    assert written.startswith("bring the ☃")
    sample.main([str(run / "model.pt"), *arguments])
    assert capsys.readouterr().out == written
    items = write_items(tmp_path / "items.jsonl", random_items(5))
    hellaswag.main([str(run), "--encoding", str(own), "--file", str(items)])
    result, yardstick = capsys.readouterr().out.splitlines()
    assert result.startswith("HellaSwag, 5 of 5 items: ")
    assert yardstick.endswith("its tokens are others, so that means over tokens do not compare")
    assert str(run) in refused(hellaswag.main, run)


def test_a_prompt_is_in_the_tokens_of_the_encoding_given(own, tmp_path, capsys, monkeypatch):
    path, prompts = checkpoint(tmp_path / "model.pt", tokens=OWN), []
    drawn = [255 - ord("a"), 258, 255 - 0x83, OWN["separator"], 259]
    monkeypatch.setattr(sample, "generate", lambda *case: iter(prompts.append(case[1]) or drawn))
    sample.main([str(path), "--encoding", str(own), "--prompt", "ring the☃"])
    assert prompts == [[260, 255 - ord("r"), 256, 257, 258, 255 - 0x83]]
    assert capsys.readouterr().out == "ring the☃a☃\n\nin\n"


def test_an_encoding_must_be_that_of_the_model(own, tmp_path, characters):
    path = checkpoint(tmp_path / "model.pt", tokens=OWN)
    for command in (sample.main, hellaswag.main):
        assert "--encoding NAME or --encoding FILE" in refused(command, path)
        line = refused(command, path, "--encoding", "gpt2")
        assert "--encoding gpt2 has vocabulary 50257 with separator 50256, expected 261 with 260" in line
        assert "is not there" in refused(command, path, "--encoding", tmp_path / "other.tiktoken")
        for sizes in ((261, 0), (300, 260)):
            other = checkpoint(tmp_path / "other.pt", tokens=dict(zip(OWN, sizes, strict=True)))
            expected = "vocabulary 261 with separator 260, expected {} with {},".format(*sizes)
            assert expected in refused(command, other, "--encoding", own)
        line = refused(command, checkpoint(tmp_path / "bytes.pt"), "--encoding", own)
        assert line.endswith("here --encoding bytes")


def test_a_run_folder_stands_for_its_model_or_its_newest_whole_checkpoint(tmp_path, corpus):
    run = run_here(corpus, steps=6, layers=2, width=32, save_every=2, keep=3, out=tmp_path / "logs")
    assert sample.model_file(run) == sample.model_file(str(run / "model.pt")) == run / "model.pt"
    assert "the newest below it is " + str(run) in refused(sample.main, tmp_path / "logs")
    (run / "model.pt").unlink()
    newest, older = sorted(run.glob("checkpoint_*.pt"))[:-3:-1]
    assert sample.model_file(run) == newest
    whole = newest.read_bytes()
    newest.write_bytes(whole[:len(whole) // 2])
    assert sample.model_file(run) == older
    for path in run.glob("checkpoint_*.pt"):
        path.unlink()
    for command in (sample.main, hellaswag.main):
        assert "neither model.pt nor checkpoint_*.pt" in refused(command, run)


def test_sample_refuses_what_it_cannot_do(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "model.pt")
    for flag, value in (("--tokens", 0), ("--temperature", -1), ("--temperature", "nan"), ("--top-k", -1),
                        ("--seed", -1)):
        line = refused(sample.main, path, flag, value)
        assert line.startswith(f"{flag} {value}") and f"for example {flag} " in line
    if not torch.cuda.is_available():
        assert "--device cpu" in refused(sample.main, path, "--device", "cuda")
    assert "cannot use" in refused(sample.main, tmp_path / "none.pt")
    other = checkpoint(tmp_path / "other.pt", tokens={"vocabulary": 100, "separator": 99})
    assert "vocabulary 100" in refused(sample.main, other)

    def unreachable(_name):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(Refusal, match="cannot be fetched .*TIKTOKEN_CACHE_DIR"):
        sample.encoding_of(*GPT2.values())


# ----------------------------------------------------------------------------------------------------------------------
# evals/hellaswag.py


def random_items(count: int) -> list[dict]:
    """Records as the set has them, with contexts and endings of many lengths; some are longer than a row."""
    draw = random.Random(0)

    def words(low: int, high: int) -> str:
        return "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(low, high)))

    return [{"ctx": words(1, 150), "endings": [words(1, 30) for _ in range(4)], "label": draw.randrange(4), "ind": i}
            for i in range(count)]


def brute_force(path, item: dict, separator: int = GPT2["separator"]) -> list[tuple[float, float]]:
    """(sum, mean) of the loss of each ending, one row and one token at a time, without padding."""
    losses, loaded = [], train_gpt2.load_model(path)
    for ending in item["endings"]:
        tokens = list((" " + ending).encode())
        text = ([separator, *item["ctx"].encode()])[-(128 - len(tokens)):] + tokens
        logits = expected_logits(path, torch.tensor(text, dtype=torch.int32), loaded)
        own = [float(logits[place - 1].logsumexp(0) - logits[place - 1, text[place]])
               for place in range(len(text) - len(tokens), len(text))]
        losses.append((sum(own), sum(own) / len(own)))
    return losses


@pytest.fixture(scope="module")
def gpt2_tokens(tmp_path_factory):
    """A model of GPT-2's tokens. Its head is drawn wide, so that endings differ."""
    return checkpoint(tmp_path_factory.mktemp("model") / "model.pt", "five-minute", tokens=GPT2, dtype=torch.float64)


def write_items(path, items: list[dict]):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_accuracy_is_that_of_a_brute_force_scorer(gpt2_tokens, tmp_path, capsys, characters, monkeypatch):
    items, scored = random_items(9), []
    losses = hellaswag.ending_losses
    monkeypatch.setattr(hellaswag, "ending_losses", lambda *case: scored.append((case[1], losses(*case)))
                        or scored[-1][1])
    monkeypatch.setattr(hellaswag, "LOGITS_AT_ONCE", 50)
    hellaswag.main([str(gpt2_tokens), "--file", str(write_items(tmp_path / "items.jsonl", items)), "--batch", "2"])
    expected = [brute_force(gpt2_tokens, item) for item in items]
    found = torch.cat([part for _, part in scored])
    torch.testing.assert_close(found.sort(0)[0], torch.tensor(expected, dtype=torch.float64).flatten(0, 1).sort(0)[0],
                               rtol=0, atol=1e-9)
    rates = [sum(min(range(4), key=lambda e: four[e][kind]) == item["label"] for four, item in
                 zip(expected, items, strict=True)) / 9 for kind in (0, 1)]
    assert rates[0] != rates[1]  # or the test could not tell one from the other
    raw, normalised = (f"{100 * rate:.2f} % ± {100 * math.sqrt(rate * (1 - rate) / 9):.2f}" for rate in rates)
    result, yardstick = capsys.readouterr().out.splitlines()
    assert result.startswith(f"HellaSwag, 9 of 9 items: {raw} raw, {normalised} length-normalised")
    assert "28.59 % raw, 29.55 % length-normalised" in yardstick and "10,042" in yardstick
    assert yardstick.endswith("chance: 25 %")
    assert [len(rows) for rows, _ in scored] == [8] * 4 + [4]
    assert max(len(tokens) for rows, _ in scored for tokens, _ in rows) == 128  # one was cut


def test_other_tokens_are_scored_when_they_are_asked_for(gpt2_tokens, tmp_path, capsys, monkeypatch):
    items = random_items(6)
    path, file = checkpoint(tmp_path / "model.pt", "five-minute"), write_items(tmp_path / "items.jsonl", items)
    hellaswag.main([str(path), "--file", str(file), "--encoding", "bytes"])
    expected = [brute_force(path, item, BYTES["separator"]) for item in items]
    rates = [sum(min(range(4), key=lambda e: four[e][kind]) == item["label"] for four, item in
                 zip(expected, items, strict=True)) / 6 for kind in (0, 1)]
    result, yardstick = capsys.readouterr().out.splitlines()
    assert [float(rate) for rate in re.findall(r"([0-9.]+) % ±", result)] == [round(100 * rate, 2) for rate in rates]
    assert "do not compare" in yardstick
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: Characters())
    for name, compares in (("gpt2", True), ("r50k_base", True), ("p50k_base", False)):  # of one size, for the test
        hellaswag.main([str(gpt2_tokens), "--file", str(file), "--encoding", name, "--limit", "1"])
        assert ("do not compare" not in capsys.readouterr().out) == compares


def test_limit_takes_items_from_all_over_the_set(gpt2_tokens, tmp_path, capsys, characters, monkeypatch):
    seen = []
    monkeypatch.setattr(hellaswag, "accuracies", lambda _, items, *__: seen.extend(items) or torch.ones(len(items), 2))
    items = random_items(40)
    file = write_items(tmp_path / "items.jsonl", items)
    hellaswag.main([str(gpt2_tokens), "--file", str(file), "--limit", "4"])
    assert [item.context for item in seen] == [items[i]["ctx"] for i in (0, 10, 20, 30)]
    assert capsys.readouterr().out.startswith("HellaSwag, 4 of 40 items: 100.00 % ± 0.00 raw")
    hellaswag.main([str(gpt2_tokens), "--file", str(file), "--limit", "99"])
    assert len(seen) == 44


def test_the_set_is_fetched_once_and_read_as_parquet(gpt2_tokens, tmp_path, capsys, characters, monkeypatch):
    items, asked = random_items(3), []

    def download(repository, name, local_dir, **options):
        asked.append((repository, name, options))
        path = local_dir / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"PAR1" + json.dumps([item | {"label": str(item["label"])} for item in items]).encode())
        return str(path)

    def read_table(path, columns):
        rows = [{name: row[name] for name in columns} for row in json.loads(path.read_bytes()[4:])]
        return types.SimpleNamespace(to_pylist=lambda: rows)

    monkeypatch.setattr(hellaswag, "DEFAULT_FOLDER", tmp_path)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setitem(sys.modules, "pyarrow",
                        types.SimpleNamespace(parquet=types.SimpleNamespace(read_table=read_table)))
    for _ in range(2):
        hellaswag.main([str(gpt2_tokens)])
    assert asked == [("Rowan/hellaswag", "data/validation-00000-of-00001.parquet",
                      {"repo_type": "dataset", "revision": hellaswag.REVISION, "token": False})]
    fetched = capsys.readouterr().out.splitlines()
    hellaswag.main([str(gpt2_tokens), "--file", str(write_items(tmp_path / "items.jsonl", items))])
    assert capsys.readouterr().out.splitlines() == fetched[:2] == fetched[2:]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(hellaswag.main, gpt2_tokens)


def test_hellaswag_refuses_what_it_cannot_score(gpt2_tokens, tmp_path, characters, monkeypatch):
    line = refused(hellaswag.main, checkpoint(tmp_path / "bytes.pt"))
    assert "vocabulary of 257, expected GPT-2's" in line and "data/text.py --encoding gpt2" in line
    for flag, value in (("--limit", -1), ("--batch", 0)):
        assert f"{flag} {value}" in refused(hellaswag.main, gpt2_tokens, flag, value)
    assert "--file" in refused(hellaswag.main, gpt2_tokens, "--file", tmp_path / "none.jsonl")
    good = random_items(1)[0]
    for bad in ({"endings": ["a", "b", "c"]}, {"label": 4}, {"label": ""}, {"ctx": None}, {"endings": "abcd"},
                {"endings": [1, 2, 3, 4]}):
        file = write_items(tmp_path / "items.jsonl", [good, good | bad])
        line = refused(hellaswag.main, gpt2_tokens, "--file", file)
        assert f"item 2 of {file}" in line and "endings" in line
    for content in ("{", "[]\n", ""):
        (tmp_path / "items.jsonl").write_text(content)
        assert "items.jsonl" in refused(hellaswag.main, gpt2_tokens, "--file", tmp_path / "items.jsonl")

    def unreachable(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(hellaswag, "DEFAULT_FOLDER", tmp_path)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    line = refused(hellaswag.main, gpt2_tokens)
    assert "Rowan/hellaswag" in line and "no network" in line and "--file" in line


# ----------------------------------------------------------------------------------------------------------------------
# evals/export.py

LOADER = """
import sys
sys.modules |= dict.fromkeys(("train_gpt2", "sample", "numpy", "safetensors", "tqdm", "tiktoken"))  # not to be imported
import torch
cases = torch.load(sys.argv[1])
sys.path.insert(0, cases[0][0])
import model
for folder, tokens, expected, close in cases:
    logits = model.load(folder).logits(tokens)
    assert logits.shape == expected.shape and logits.dtype == expected.dtype, (folder, logits.shape)
    worst = float((logits - expected).abs().max())
    assert worst <= close, (folder, worst)
    assert model.load(folder).logits(tokens[:1]).shape == expected[:1].shape
print("equal")
"""


def test_an_exported_model_gives_the_same_logits_in_a_clean_process(tmp_path, capsys):
    cases, tokens = [], texts(1, 128, 256)[0]
    kinds = [("five-minute", None, torch.float32, {}), ("tiny", None, torch.float32, {}),
             ("gpt2", 0, torch.float64, {}), ("gpt2", None, torch.float64, {"cross_document": False}),
             ("gpt2-medium", 0, torch.float64, {}), ("gpt2-medium", None, torch.float32, {}),
             ("gpt2-xl", None, torch.float64, {}), ("gpt2", 800, torch.float32, {}),
             ("five-minute", None, torch.bfloat16, {}),
             ("tiny", None, torch.float64, {"softcap": (0.0, 1.0, 0.0), "qk_norm": False, "x0_shortcut": False})]
    for number, (recipe, step, dtype, changes) in enumerate(kinds):
        path, folder = checkpoint(tmp_path / f"{number}.pt", recipe, step, dtype, **changes), tmp_path / str(number)
        export.main([str(path), "--out", str(folder)])
        cases.append((str(folder), tokens, expected_logits(path, tokens), CLOSE.get(dtype, 0.05)))
    torch.save(cases, tmp_path / "cases.pt")
    done = start(["-I", "-c", LOADER, tmp_path / "cases.pt"], cwd=tmp_path)
    assert done.stdout == "equal\n", done.stderr


def loaded_module(folder):
    spec = importlib.util.spec_from_file_location("exported_model_of_a_test", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_hold_what_they_say(tmp_path, capsys):
    path, folder = checkpoint(tmp_path / "model.pt", "gpt2", 0, dtype=torch.bfloat16), tmp_path / "exported"
    export.main([str(path)])
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.py", "model.safetensors"]
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    library, module = load_file(folder / "model.safetensors"), loaded_module(folder)
    own = module.read_tensors(folder)
    assert {name: (w.dtype, w.shape) for name, w in own.items()} == {
        name: (w.dtype, w.shape) for name, w in library.items()}
    assert all(own[name].equal(library[name]) for name in library)
    assert "embedding" not in library and library["head"].shape == (257, 32)  # one table, without padding
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocabulary"], config["separator"], config["step"], config["val_loss"]) == (257, 256, 0, 1.25)
    assert config["encoding"].startswith("bytes")
    said = " ".join(config["no_standard_class"])
    for technique in ("pairs", "token before", "gate", "token pairs", "values", "capped", "without attention"):
        assert technique in said
    assert "values of layer 0" not in said
    output = capsys.readouterr().out
    assert f"{sum(w.numel() for w in library.values()):,} numbers" in output and "no standard Hugging Face" in output


@pytest.mark.parametrize("block", [1, 16, 100])
def test_the_exported_attention_may_be_cut_anywhere(tmp_path, block):
    path, tokens = checkpoint(tmp_path / "model.pt", "gpt2", dtype=torch.float64), texts(1, 100, 256, 1)[0]
    export.main([str(path), "--out", str(tmp_path / "deep" / "out")])
    module = loaded_module(tmp_path / "deep" / "out")
    module.BLOCK = block
    torch.testing.assert_close(module.load().logits(tokens), expected_logits(path, tokens), rtol=0, atol=1e-10)


def test_export_refuses_what_it_cannot_write(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "model.pt")
    assert "--out" in refused(export.main, path, "--out", path)
    assert "cannot use" in refused(export.main, tmp_path / "none.pt")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refused(export.main, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pt"]
