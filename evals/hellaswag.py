"""HellaSwag: how often a checkpoint finds the true one of four endings of a text likeliest.

    python evals/hellaswag.py logs/RUN/model.pt                # all 10,042 items of the validation set
    python evals/hellaswag.py logs/RUN/model.pt --limit 1000   # fewer, spread evenly over it; the error bar grows
    python evals/hellaswag.py logs/RUN --encoding mine.tiktoken  # the newest of a run, of an own tokenizer

Completion style: each ending follows the context, and its loss is that of its own tokens alone, as their sum (raw) and
as their mean (length-normalised); the ending with the smallest counts as the answer. The original GPT-2 124M reaches
28.59 % and 29.55 % this way, chance is 25 %. A text begins with the separator, as documents do in training.

The set is fetched once from its author's public repository, as a Parquet file, which the package pyarrow reads. --file
takes JSON lines with ctx, endings and label, or such a Parquet file, and then needs no network.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import sample

import train_gpt2 as script
from train_gpt2 import GPT, Refusal

REPOSITORY, FILE = "Rowan/hellaswag", "data/validation-00000-of-00001.parquet"
REVISION = "218ec52e09a7e7462a5400043bb9a69a41d06b76"
ITEMS = 10_042
DEFAULT_FOLDER = HERE.parent / "data" / "hellaswag"
GPT2_RAW, GPT2_NORMALISED = 28.59, 29.55  # per cent, of the original with 124M parameters
LOGITS_AT_ONCE = 1024  # tokens


class Item(NamedTuple):
    context: str
    endings: list[str]
    label: int  # which ending is the true one


def fetched(folder: Path) -> Path:
    """The validation set's file, downloaded unless it is there. Raises Refusal."""
    path = folder / FILE
    if path.exists():
        return path
    try:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.utils import HfHubHTTPError
    except ImportError:
        raise Refusal("the package huggingface_hub is missing: pip install huggingface_hub") from None
    place = {"repo_type": "dataset", "revision": REVISION}
    try:
        try:  # one request without the download's long retries tells at once that there is no network
            get_hf_file_metadata(hf_hub_url(REPOSITORY, FILE, **place), token=False)
        except HfHubHTTPError:
            pass
        return Path(hf_hub_download(REPOSITORY, FILE, **place, local_dir=folder, token=False))
    except Exception as error:  # noqa: BLE001  each version of the client lets other libraries' errors through
        reason = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
        raise Refusal(f"cannot fetch {FILE} of {REPOSITORY} from {constants.ENDPOINT}: {reason}; try again with a "
                      "network, or give the set as JSON lines with --file") from None


def read_items(path: Path) -> list[Item]:
    """JSON lines, or Parquet by its first bytes. Raises Refusal, with the line, for what holds no items."""
    try:
        with open(path, "rb") as file:
            is_parquet = file.read(4) == b"PAR1"
    except OSError as error:
        raise Refusal(f"cannot read {path}: {error.strerror}; give the validation set with --file") from None
    records = parquet_records(path) if is_parquet else path.read_bytes().splitlines()
    items = []
    for number, record in enumerate(records, 1):
        try:
            record = record if is_parquet else json.loads(record)
            item = Item(record["ctx"], record["endings"], int(record["label"]))  # which Parquet has as a text
            valid = isinstance(item.endings, list) and len(item.endings) == 4 and 0 <= item.label < 4
            if not valid or not all(isinstance(text, str) for text in (item.context, *item.endings)):
                raise ValueError("not four endings and the number of one")
        except (ValueError, KeyError, TypeError) as error:
            raise Refusal(f"item {number} of {path} is none of HellaSwag ({type(error).__name__}: {str(error)[:80]}); "
                          'expected {"ctx": text, "endings": four texts, "label": 0 to 3}; remove the file and give '
                          "another with --file") from None
        items.append(item)
    if not items:
        raise Refusal(f"{path} holds no item; expected a line for each; give another with --file")
    return items


def parquet_records(path: Path) -> list[dict]:
    """The rows of a Parquet file. Raises Refusal where it is damaged or nothing is there to read it."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise Refusal(f"the package pyarrow is missing, which reads {path}: pip install pyarrow (or give the set as "
                      "JSON lines with --file)") from None
    try:
        return parquet.read_table(path, columns=["ctx", "endings", "label"]).to_pylist()
    except Exception as error:  # noqa: BLE001  errors of several libraries
        raise Refusal(f"cannot read {path}: {' '.join(str(error).split())[:200]}; remove it, the next call fetches it "
                      "again") from None


def rows_of(item: Item, encode: Callable[[str], list[int]], separator: int, longest: int) -> list[tuple]:
    """For each ending, (all tokens, how many of them are the ending's); of contexts that are too long the beginning is
    left out, of endings the end."""
    context, rows = [separator, *encode(item.context)], []
    for ending in item.endings:
        tokens = encode(" " + ending)[:longest - 1]
        rows.append(([*context[-(longest - len(tokens)):], *tokens], len(tokens)))
    return rows


@torch.no_grad()
def ending_losses(model: GPT, rows: list[tuple], separator: int, windows: tuple[int, int]) -> torch.Tensor:
    """(rows, 2) float64: the summed cross-entropy of each ending's tokens in nats, and its mean over them."""
    device, longest = model.head.device, max(len(tokens) for tokens, _ in rows)
    tokens = torch.full((len(rows), longest), separator, dtype=torch.int32)  # filled up behind, which nothing sees
    ends = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (text, count) in enumerate(rows):
        tokens[row, :len(text)] = torch.tensor(text, dtype=torch.int32)
        ends[row, len(text) - count:len(text)] = True
    hidden = sample.all_hidden(model, tokens.to(device), separator, windows)
    chosen = hidden[:, :-1][ends[:, 1:].to(device)]  # the places before those of the endings
    targets = tokens[ends].long().to(device)
    losses = torch.cat([F.cross_entropy(model.logits(some), wanted, reduction="none").double().cpu() for some, wanted in
                        zip(chosen.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True)])
    sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, ends.nonzero()[:, 0], losses)
    return torch.stack((sums, sums / ends.sum(1)), dim=1)


def accuracies(model: GPT, items: list[Item], encode: Callable[[str], list[int]], separator: int,
               windows: tuple[int, int], batch: int) -> torch.Tensor:
    """(items, 2) bool: whether the true ending has the least loss, raw and length-normalised."""
    longest = max(model.config.row_tokens)
    texts = [rows_of(item, encode, separator, longest) for item in items]
    order = sorted(range(len(items)), key=lambda i: max(len(tokens) for tokens, _ in texts[i]))  # little to fill up
    right = torch.zeros(len(items), 2, dtype=torch.bool)
    with tqdm(total=len(items), unit="item", desc="HellaSwag", disable=None, mininterval=0.5) as progress:
        for begin in range(0, len(items), batch):
            some = order[begin:begin + batch]
            losses = ending_losses(model, [row for i in some for row in texts[i]], separator, windows)
            labels = torch.tensor([items[i].label for i in some])
            right[some] = losses.view(len(some), 4, 2).argmin(1) == labels[:, None]
            progress.update(len(some))
    return right


def main(arguments: list[str] | None = None) -> None:
    """Command line. Raises Refusal for what is no checkpoint, for models of other tokens whose encoding is not given,
    for a set that cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="a model.pt or checkpoint_*.pt, or a run folder: its model.pt, else its newest checkpoint")
    parser.add_argument("--encoding", metavar="NAME|FILE",
                        help="what the shards were made with, as for data/text.py (default gpt2)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="items, spread evenly (default 0: all)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="items at once, four rows each (default 8)")
    parser.add_argument("--file", type=Path, metavar="PATH", help="the validation set, instead of fetching it")
    options = parser.parse_args(arguments)
    for flag, value, least in (("--limit", options.limit, 0), ("--batch", options.batch, 1)):
        if value < least:
            raise Refusal(f"{flag} {value} is out of range: expected {least} or more, for example {flag} 16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, saved = script.load_model(sample.model_file(options.checkpoint), device)
    compares = options.encoding in (None, "gpt2", "r50k_base") and (  # two names of one encoding
        (saved["vocabulary"], saved["separator"]) == (script.GPT2_VOCABULARY, script.GPT2_SEPARATOR))
    if not compares and options.encoding is None:
        raise Refusal(f"{options.checkpoint} has a vocabulary of {saved['vocabulary']}, expected GPT-2's tokens, "
                      f"{script.GPT2_VOCABULARY}, for models of bytes and others do not compare; train one on FineWeb, "
                      "or on text made with: python data/text.py --encoding gpt2 (or give what its shards were made "
                      "with: --encoding NAME or --encoding FILE.tiktoken)")
    encode, _ = sample.encoding_of(saved["vocabulary"], saved["separator"], options.encoding)
    items = read_items(options.file or fetched(DEFAULT_FOLDER))
    whole = len(items)
    if options.limit and options.limit < whole:
        items = [items[i * whole // options.limit] for i in range(options.limit)]
    right = accuracies(sample.settle(model), items, encode, saved["separator"],
                       script.windows_at(saved["step"], model.config), options.batch)
    rates = right.double().mean(0).tolist()
    raw, normalised = (f"{100 * rate:.2f} % ± {100 * math.sqrt(rate * (1 - rate) / len(items)):.2f}" for rate in rates)
    print(f"HellaSwag, {len(items):,} of {whole:,} items: {raw} raw, {normalised} length-normalised (± one standard "
          "error)")
    print(f"the original GPT-2 124M on all {ITEMS:,}: {GPT2_RAW} % raw, {GPT2_NORMALISED} % length-normalised; chance: "
          "25 %" + "; its tokens are others, so that means over tokens do not compare" * (not compares))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
