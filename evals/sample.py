"""Print text of a model that train_gpt2.py wrote, token by token.

    python evals/sample.py logs/RUN --prompt "ROMEO:" --tokens 200 --temperature 0.8 --seed 1
    python evals/sample.py logs --prompt "def " --prompt "class " --top-k 40    # of the newest run
    python evals/sample.py logs/RUN --encoding mine.tiktoken                    # of an own tokenizer

Keys and values of the text so far are kept, so that a token costs the work of a few tokens, whatever
the length of the text. Draws are made on the CPU: a seed means the same on any device.
"""

import argparse
import codecs
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: on a busy machine waiting threads leave the processor

# Before torch as well: it says in one line which variable of the environment makes tqdm fail, which torch imports.
from text import BYTES, Encoding, Parser, encoding_named, open_streams, typed_path  # isort: split

import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt2 as script
from train_gpt2 import GPT, Phase, UserError

CHECKPOINT = "a model.pt or checkpoint_*.pt, a run folder, or a folder of runs: of its newest"
# What the shards were made with, where vocabulary and separator tell.
KNOWN = {BYTES[:2]: "bytes", (script.GPT2_VOCABULARY, script.GPT2_SEPARATOR): "gpt2"}
CHUNK = 512  # tokens of a prompt that go through the model at once


def model_file(place: Path) -> Path:
    """A file as it is; of a run's folder model.pt, or its newest checkpoint that is whole; of a folder
    of runs that of the newest. Raises UserError for a folder without."""
    if not place.is_dir():
        return place
    runs = (place, *sorted(place.glob("*/"), reverse=True))  # names begin with the time
    files = [path for run in runs for path in (*run.glob("model.pt"), *script.checkpoints(run)[::-1])]
    if not files:
        raise UserError(f"{place} has no model.pt or checkpoint_*.pt, and no run in it has one")
    for path in files:
        with contextlib.suppress(UserError):
            script.read_checkpoint(path)
            return path
    return files[0]  # which load_model refuses


@torch.no_grad()
def settle(model: GPT) -> GPT:
    """The same model, with done once what each pass computes from weights alone: matrices in the type
    of the stream, attention's scalars multiplied in. The logits stay equal to the bit."""
    model.head.data = model.head.to(model.dtype)
    for block in model.blocks:
        block.mlp.data = block.mlp.to(model.dtype)
        if block.attends:
            block.qk.data, block.vo.data = block.qk.to(model.dtype), block.vo.to(model.dtype)
        if block.in_scale is not None:
            block.qk.data, (value, out) = block.in_scale * block.qk, block.vo
            block.vo.data = torch.stack((block.in_scale * value, block.out_scale * out))
            block.in_scale = block.out_scale = None
    return model


def open_model(place: str | Path, device: str = "cpu") -> tuple[GPT, Phase, dict]:
    """A settled model, its phase, and what was saved with it. Raises UserError."""
    model, saved = script.load_model(model_file(typed_path(str(place))), device)
    if bad := [name for name, weight in saved["weights"].items() if not weight.isfinite().all()]:
        raise UserError(f"{saved['path']} has numbers in {bad[0]} that are not finite; give an earlier checkpoint")
    return settle(model), script.phase_at(saved["step"], model.config), saved


def encoding_of(saved: dict, name: str | None = None) -> Encoding:
    """What the shards were made with: by name, or the known one. Raises UserError."""
    sizes = saved["vocabulary"], saved["separator"]
    name = name or KNOWN.get(sizes)
    if name is None:
        raise UserError(f"{saved['path']} has a vocabulary of its own, {sizes[0]} with separator {sizes[1]}; "
                        "give what its shards were made with: --encoding NAME or --encoding FILE.tiktoken")
    encoding = encoding_named(name)
    if encoding[:2] != sizes:
        raise UserError(f"--encoding {name} has vocabulary {encoding.vocabulary} with separator "
                        f"{encoding.separator}, but {saved['path']} has {sizes[0]} with {sizes[1]}; give "
                        f"what its shards were made with: --encoding {KNOWN.get(sizes, 'NAME or FILE')}")
    return encoding


class Cache:
    """Goes through a text piece by piece. A pass is the model's own, with one function exchanged:
    attention looks at the keys and values kept from earlier passes too.

    A token's embedding looks back at one token, but the first two of a pass have bigrams of their own, and
    its keys look at the token before it, whole. So each pass repeats the last three, and drops what they yield.
    """

    def __init__(self, model: GPT, phase: Phase, separator: int):
        self.model, self.phase, self.separator = model, phase, separator
        self.tokens = torch.zeros(1, 0, dtype=torch.int32, device=model.head.device)  # so far
        # Of the layers that attend, in order; keys and values (1, H, positions, K), as far as windows
        # reach. Each pass takes all from the left and puts them back at the right.
        self.layers = deque((block, None, None) for block in model.blocks if block.attends)

    @torch.no_grad()
    def advance(self, tokens: Tensor) -> Tensor:
        """(1, T) int32, the next tokens -> (1, T, D), ready for the head."""
        self.repeated = min(3, self.tokens.shape[1])
        self.begin = self.tokens.shape[1] - self.repeated
        self.tokens = torch.cat((self.tokens, tokens), dim=1)
        inputs = self.tokens[:, self.begin:]
        own, script.attention = script.attention, self.attention
        try:
            return self.model(inputs, inputs == self.separator, self.phase)[:, self.repeated:]
        finally:
            script.attention = own

    def attention(self, query: Tensor, key: Tensor, value: Tensor, _mask, _kernel) -> Tensor:
        """Of the next layer, all (1, H, positions, K). A token has two positions in paired layers."""
        block, old_key, old_value = self.layers.popleft()
        each, window = 1 + block.paired, self.phase.windows[block.short]
        angles = each * self.begin * self.model.frequencies[self.phase.stage]  # from the text's start on
        tables = [table[1] for table in script.rotary_tables(angles, 2, query.shape[-1], query.dtype)]
        query, key = (script.rotary(part, *tables, block.rotary_channels) for part in (query, key))
        if old_key is not None:
            key = torch.cat((old_key, key[:, :, each * self.repeated:]), dim=2)
            value = torch.cat((old_value, value[:, :, each * self.repeated:]), dim=2)
        reach = window + 3 * each  # of the tokens that the next pass repeats
        self.layers.append((block, key[:, :, -reach:], value[:, :, -reach:]))
        starts = self.tokens == self.separator
        if block.paired:
            starts = torch.stack((starts, torch.zeros_like(starts)), dim=-1).flatten(1)
        position, queries = torch.arange(starts.shape[1], device=starts.device), query.shape[2]
        first_key = script.first_visible_key(script.document_starts(starts), window)[0, -queries:, None]
        last_key, position = position[-queries:, None], position[-key.shape[2]:]
        visible = (first_key <= position) & (position <= last_key)
        return F.scaled_dot_product_attention(query, key, value, visible, scale=1.0)


def drawn(logits: Tensor, temperature: float, top_k: int, draw: torch.Generator) -> int:
    """(V,) -> a token: the likeliest at temperature 0, else by chance among the `top_k` likeliest, or
    among all if that is 0."""
    logits = logits.double().cpu()
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    chances = torch.softmax((logits - logits.max()) / temperature, 0)  # finite at any temperature
    return int(torch.multinomial(chances, 1, generator=draw))


def generate(model: GPT, phase: Phase, tokens: list[int], separator: int, count: int, temperature: float,
             top_k: int = 0, seed: int = 0) -> Iterator[int]:
    """Yield `count` tokens that follow `tokens`. The context is a row of training at most; when it is
    full, its older half is forgotten."""
    draw, row = torch.Generator().manual_seed(seed), max(model.config.row_tokens)
    cache, new = Cache(model, phase, separator), torch.tensor([tokens], dtype=torch.int32)
    for _ in range(count):
        new = new.to(model.head.device)
        if cache.tokens.shape[1] + new.shape[1] > row:
            new = torch.cat((cache.tokens, new), dim=1)[:, -(row // 2):]
            cache = Cache(model, phase, separator)
        for part in new.split(CHUNK, dim=1):
            hidden = cache.advance(part)
        token = drawn(model.logits(hidden[0, -1]).detach(), temperature, top_k, draw)
        new = torch.tensor([[token]], dtype=torch.int32)
        yield token


def main(arguments: list[str] | None = None) -> None:
    """The command line. Raises UserError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    add("--encoding", metavar="NAME|FILE", help="what the shards were made with, as for data/text.py "
        "(default: bytes or gpt2, where the model has that vocabulary)")
    add("--prompt", action="append", metavar="TEXT",
        help="what the text begins with (default: nothing); given several times, a text for each")
    add("--tokens", type=int, default=200, metavar="N", help="length of a text (default 200)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0: likeliest token (default 0.8)")
    add("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest (default 0: all)")
    add("--seed", type=int, default=0, metavar="S",
        help="of the first text's draws, the next has S + 1 (default 0)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if there is one")
    options, has_gpu = parser.parse_args(arguments), torch.cuda.is_available()
    for name, least, most in (("tokens", 1, 2**31), ("temperature", 0, 1e6), ("top_k", 0, 2**31),
                              ("seed", 0, 2**62)):
        value = getattr(options, name)
        if not least <= value <= most:
            parser.error(f"{script.flag(name)} {value} is not from {least} to {most:.0f}")
    if options.device == "cuda" and not has_gpu:
        parser.error("--device cuda, but torch finds no GPU here; give --device cpu")
    device = "cuda" if options.device != "cpu" and has_gpu else "cpu"
    model, phase, saved = open_model(options.checkpoint, device)
    encoding, prompts = encoding_of(saved, options.encoding), options.prompt or [""]
    separator, began = saved["separator"], time.perf_counter()
    for number, prompt in enumerate(prompts):
        print(("\n" + "-" * 72 + "\n") * (number > 0) + prompt, end="", flush=True)
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")  # keeps half a character
        tokens = [separator, *encoding.encode(prompt).tolist()]
        for token in generate(model, phase, tokens, separator, options.tokens, options.temperature,
                              options.top_k, options.seed + number):
            word = b"\n\n" if token == separator else encoding.decode(token)
            print(text.decode(word), end="", flush=True)
        print(text.decode(b"", final=True))
    count, seconds = options.tokens * len(prompts), time.perf_counter() - began
    print(f"{count:,} tokens in {seconds:.2f} s with their prompts, {count / seconds:,.0f} tokens/s on "
          f"{device} in {model.config.dtype}, from {saved['path']}", file=sys.stderr)


def command(main: Callable[[], None], errors: str = "backslashreplace") -> None:
    """`main` as a program: no traceback where the reader of a pipe leaves early, where the terminal
    lacks a character (`errors`: what stands for it), or on Ctrl-C."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    open_streams()
    sys.stdout.reconfigure(errors=errors)
    try:
        main()
        print(end="", flush=True)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        sys.stdout = None  # what is left in it cannot be written either
        raise SystemExit(f"cannot read or write: {error}") from None


if __name__ == "__main__":
    command(main, errors="replace")  # a text, not names of files
