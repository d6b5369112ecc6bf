"""HellaSwag: how often a model finds the true one of four endings of a text likeliest.

    python evals/hellaswag.py logs/RUN                  # all 10,042 items of the validation set
    python evals/hellaswag.py logs/RUN --limit 1000     # fewer, from all over it; the error grows
    python evals/hellaswag.py logs/RUN --encoding mine.tiktoken    # of an own tokenizer

Completion style: each ending follows the context, and its loss is that of its own tokens, as their sum
(raw) and as their mean (length-normalised). The ending with the smallest counts as the answer. A text
begins with the separator, as documents do in training.

The set is fetched once from its author's public repository, as Parquet, which the package pyarrow reads.
--file takes such a file, or JSON lines with ctx, endings and label, and needs no network.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "data")]

import sample  # before torch and tqdm, of which it checks the surroundings
import torch
import torch.nn.functional as F
from text import Encoding, Parser, in_utf8, typed_path
from torch import Tensor
from tqdm import tqdm

from train_gpt2 import GPT, Phase, UserError

REPOSITORY, FILE = "Rowan/hellaswag", "data/validation-00000-of-00001.parquet"
REVISION = "218ec52e09a7e7462a5400043bb9a69a41d06b76"
DEFAULT_FOLDER = HERE.parent / "data" / "hellaswag"
GPT2_HAS = "the original GPT-2 124M on all 10,042: 28.59 % raw, 29.55 % length-normalised; chance: 25 %"
LOGITS_AT_ONCE = 1024  # tokens


class Item(NamedTuple):
    context: str
    endings: list[str]
    label: int  # which ending is the true one


def fetched(folder: Path) -> Path:
    """The validation set, downloaded unless it is there. Raises UserError."""
    if (folder / FILE).exists():
        return folder / FILE
    try:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.utils import HfHubHTTPError
    except ImportError:
        raise UserError("the package huggingface_hub is missing: pip install huggingface_hub") from None
    place = {"repo_type": "dataset", "revision": REVISION}
    try:
        try:  # a download retries for long; one request tells at once that there is no network
            get_hf_file_metadata(hf_hub_url(REPOSITORY, FILE, **place), token=False)
        except HfHubHTTPError:
            pass
        return Path(hf_hub_download(REPOSITORY, FILE, **place, local_dir=folder, token=False))
    except Exception as error:  # noqa: BLE001  the client lets other libraries' errors through
        raise UserError(f"cannot fetch {FILE} of {REPOSITORY} from {constants.ENDPOINT}: "
                        f"{error.__cause__ or error!s:.200}; try again with a network, or give the set as "
                        "JSON lines with --file") from None


def read_items(path: Path) -> list[Item]:
    """Parquet, by its first bytes, or JSON lines. Raises UserError for all that is no item."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file; give the set with --file")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the set with --file") from None
    is_parquet, items = content.startswith(b"PAR1"), []
    records = parquet_records(path) if is_parquet else filter(bytes.strip, content.splitlines())
    for number, record in enumerate(records, 1):
        try:
            record = record if is_parquet else json.loads(record)
            label = ("0", "1", "2", "3").index(str(record["label"]))  # Parquet has it as a text
            if type(endings := record["endings"]) is not list or len(endings) != 4:
                raise ValueError("not four endings")
            context, *endings = (in_utf8(text).decode() for text in (record["ctx"], *endings))
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"item {number} of {path} is none of HellaSwag ({type(error).__name__}: "
                            f'{error!s:.80}); expected {{"ctx": text, "endings": four texts, "label": 0 to '
                            "3}; give another file with --file") from None
        items.append(Item(context, endings, label))
    if not items:
        raise UserError(f"{path} has no item; give another file with --file")
    return items


def parquet_records(path: Path) -> list[dict]:
    """The rows of a Parquet file. Raises UserError."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path} needs the package pyarrow: pip install pyarrow; or give the set as JSON "
                        "lines with --file") from None
    try:
        return parquet.read_table(path, columns=["ctx", "endings", "label"]).to_pylist()
    except Exception as error:  # noqa: BLE001  errors of several libraries
        raise UserError(f"cannot read {path}: {error!s:.200}; remove it: the next call fetches it") from None


def rows_of(item: Item, encoding: Encoding, longest: int) -> list[tuple[list[int], int]]:
    """For each ending all tokens, and how many of them are its own. Contexts that are too long lose
    their beginning, endings their end."""
    context, rows = [encoding.separator, *encoding.encode(item.context).tolist()], []
    for ending in item.endings:
        tokens = encoding.encode(" " + ending).tolist()[:longest - 1]
        rows.append(([*context[len(tokens) - longest:], *tokens], len(tokens)))
    return rows


@torch.no_grad()
def ending_losses(model: GPT, phase: Phase, rows: list[tuple[list[int], int]], separator: int) -> Tensor:
    """(rows, 2) float64: the cross-entropy of each ending's tokens in nats, their sum and mean."""
    device, longest = model.head.device, max(len(text) for text, _ in rows)
    tokens = torch.full((len(rows), longest), separator, dtype=torch.int32)  # behind a text: unseen
    ends = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (text, count) in enumerate(rows):
        tokens[row, :len(text)] = torch.tensor(text)
        ends[row, len(text) - count:len(text)] = True
    inputs, targets = tokens.to(device), tokens[ends].long().to(device)
    hidden = model(inputs, inputs == separator, phase)[:, :-1][ends[:, 1:].to(device)]  # before endings
    chunks = zip(hidden.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True)
    losses = torch.cat([F.cross_entropy(model.logits(part), wanted, reduction="none").double().cpu()
                        for part, wanted in chunks])
    sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, ends.nonzero()[:, 0], losses)
    return torch.stack((sums, sums / ends.sum(1)), dim=1)


def accuracies(model: GPT, phase: Phase, items: list[Item], encoding: Encoding, batch: int) -> Tensor:
    """(items, 2) bool: whether the true ending has the least loss, raw and length-normalised."""
    texts = [rows_of(item, encoding, max(model.config.row_tokens)) for item in items]
    by_length = sorted(range(len(items)), key=lambda i: max(len(text) for text, _ in texts[i]))
    right = torch.zeros(len(items), 2, dtype=torch.bool)
    with tqdm(total=len(items), unit="item", desc="HellaSwag", disable=None) as progress:
        for begin in range(0, len(items), batch):
            some = by_length[begin:begin + batch]
            rows = [row for i in some for row in texts[i]]
            losses = ending_losses(model, phase, rows, encoding.separator).view(len(some), 4, 2)
            right[some] = losses.argmin(1) == torch.tensor([[items[i].label] for i in some])
            progress.update(len(some))
    return right


def main(arguments: list[str] | None = None) -> None:
    """The command line. Raises UserError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help=sample.CHECKPOINT)
    add("--encoding", metavar="NAME|FILE", help="what the shards were made with, as for data/text.py "
        "(default gpt2)")
    add("--limit", type=int, default=0, metavar="N", help="items, spread evenly (default 0: all)")
    add("--batch", type=int, default=8, metavar="N", help="items at once, four rows each (default 8)")
    add("--file", type=typed_path, metavar="PATH", help="the validation set, instead of fetching it")
    options = parser.parse_args(arguments)
    for name, value, least in (("--limit", options.limit, 0), ("--batch", options.batch, 1)):
        if value < least:
            parser.error(f"{name} {value} is below {least}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, phase, saved = sample.open_model(options.checkpoint, device)
    is_gpt2 = sample.KNOWN.get((saved["vocabulary"], saved["separator"])) == "gpt2"
    if not is_gpt2 and options.encoding is None:
        raise UserError(f"{saved['path']} has a vocabulary of {saved['vocabulary']}, not GPT-2's; give what "
                        "its shards were made with: --encoding bytes, NAME or FILE.tiktoken")
    encoding = sample.encoding_of(saved, options.encoding)
    items = read_items(options.file or fetched(DEFAULT_FOLDER))
    whole = len(items)
    if 0 < options.limit < whole:
        items = [items[i * whole // options.limit] for i in range(options.limit)]
    rates = accuracies(model, phase, items, encoding, options.batch).double().mean(0).tolist()
    raw, normalised = (f"{100 * rate:.2f} % ± {100 * math.sqrt(rate * (1 - rate) / len(items)):.2f}"
                       for rate in rates)
    compares = is_gpt2 and options.encoding in (None, "gpt2", "r50k_base")  # two names of one encoding
    print(f"HellaSwag, {len(items):,} of {whole:,} items: {raw} raw, {normalised} length-normalised "
          f"(± one standard error), {saved['path']}")
    print(GPT2_HAS + "; its tokens are others, so that means over tokens do not compare" * (not compares))


if __name__ == "__main__":
    sample.command(main)
