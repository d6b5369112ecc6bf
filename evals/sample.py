"""Print text from a model.pt or checkpoint that train_gpt2.py wrote, on CPU or GPU, token by token as it is drawn.

    python evals/sample.py logs/RUN/model.pt --prompt "ROMEO:" --tokens 200 --temperature 0.8 --seed 1
    python evals/sample.py logs/RUN/model.pt --prompt "def " --prompt "class " --top-k 40
    python evals/sample.py logs/RUN --encoding mine.tiktoken         # the newest of a run, of an own tokenizer

Each new token costs one token's work: keys and values of the tokens before it are kept (`Cache`). The speed stands on
stderr at the end. Draws are made on the CPU, so that a seed means the same on any device.
"""

import argparse
import codecs
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from text import BYTES, encoding_named

import train_gpt2 as script
from train_gpt2 import GPT, Refusal

BYTES_VOCABULARY, BYTES_SEPARATOR = BYTES.vocabulary, BYTES.separator
CHUNK = 512  # tokens of a prompt that go through the model at once


def encoding_of(vocabulary: int, separator: int, name: str | None = None,
                ) -> tuple[Callable[[str], list[int]], Callable[[int], bytes]]:
    """(text -> tokens, token -> bytes) of what the shards were written with: bytes or GPT-2's where vocabulary and
    separator are theirs, else what `name` says. Raises Refusal where that is missing or another one."""
    own = {(BYTES_VOCABULARY, BYTES_SEPARATOR): "bytes",
           (script.GPT2_VOCABULARY, script.GPT2_SEPARATOR): "gpt2"}.get((vocabulary, separator))
    if name is None and own is None:
        raise Refusal(f"the checkpoint has vocabulary {vocabulary} with separator {separator}, expected bytes "
                      f"({BYTES_VOCABULARY}, {BYTES_SEPARATOR}) or GPT-2 ({script.GPT2_VOCABULARY}, "
                      f"{script.GPT2_SEPARATOR}), else what its shards were made with: --encoding NAME or "
                      "--encoding FILE.tiktoken")
    encoding = encoding_named(name or own)
    if (encoding.vocabulary, encoding.separator) != (vocabulary, separator):
        raise Refusal(f"--encoding {name} has vocabulary {encoding.vocabulary} with separator {encoding.separator}, "
                      f"expected {vocabulary} with {separator}, as the checkpoint has; give what its shards were made "
                      f"with{f', here --encoding {own}' if own else ''}")
    return (lambda text: encoding.encode(text).tolist()), encoding.decode


def model_file(place: str | Path) -> Path:
    """A file as it is; of a run folder its model.pt, or else its newest checkpoint that is not damaged. Raises
    Refusal for a folder without."""
    place = Path(place)
    if not place.is_dir():
        return place
    if (place / "model.pt").exists():
        return place / "model.pt"
    if script.checkpoints(place):
        return Path(script.find_checkpoint(place)["path"])
    below = sorted({path.parent for path in (*place.glob("*/model.pt"), *place.glob("*/checkpoint_*.pt"))})
    raise Refusal(f"{place} holds neither model.pt nor checkpoint_*.pt, expected a run folder with one"
                  + "".join(f"; the newest below it is {run}" for run in below[-1:]))


@torch.no_grad()
def settle(model: GPT) -> GPT:
    """The same model with what each pass would compute anew from weights alone done once: matrices in the type of the
    stream, the scalars of attention multiplied in. The logits stay the same to the bit."""
    dtype = model.dtype
    model.head.data = model.head.to(dtype)
    for block in model.blocks:
        block.mlp.data = block.mlp.to(dtype)
        if block.attends:
            into, out = block.attention.to(dtype).split((3, 1))
            if block.into is not None:
                into, out = block.into * into, block.out * out
                block.into = block.out = None
            block.attention = nn.Parameter(torch.cat((into, out)))
    return model


class Cache:
    """What the tokens so far leave for those to come: in each layer that attends, the keys and values that its window
    still reaches; and the last token, which smear, bigrams and key offset look back at. Rows are texts of one length,
    as long as a row of training at most."""

    def __init__(self, model: GPT, rows: int, windows: tuple[int, int]):
        """windows: (long, short), as `windows_at` has them."""
        self.model, self.windows, self.count, device = model, windows, 0, model.head.device
        self.tokens = torch.zeros(rows, 0, dtype=torch.int32, device=device)  # the last one, none at first
        self.alone = torch.zeros(rows, 0, dtype=torch.bool, device=device)  # whether it may not look back itself
        self.document = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # where its document began
        heads, head_width = model.config.heads, model.config.width // model.config.heads
        nothing = torch.zeros(rows, 0, heads, head_width, dtype=model.dtype, device=device)
        self.layers = [{"key": nothing[:, :, :heads // (1 + layer.paired)],  # (R, positions, H, K), those in reach
                        "value": nothing[:, :, :heads // (1 + layer.paired)], "last": nothing}  # key not yet offset
                       if layer.attends else None for layer in model.plan]

    @torch.no_grad()
    def advance(self, tokens: Tensor, separator: int) -> Tensor:
        """(R, T) int32, the next tokens of each row -> (R, T, D), what the model itself gives at these places, ready
        for the head."""
        model, config, epsilon, count = self.model, self.model.config, self.model.config.rms_epsilon, tokens.shape[1]
        starts = tokens == separator
        alone = torch.zeros_like(starts) if config.cross_document else starts.clone()
        alone[:, 0] |= self.count == 0
        self.tokens, self.alone = torch.cat((self.tokens, tokens), 1), torch.cat((self.alone, alone), 1)
        embedded = F.embedding(self.tokens, model.head if model.tied else model.embedding).to(model.dtype)
        bigram = second = None
        if config.smear:
            embedded = script.smear(embedded, model.smear_mix, model.smear_gate, self.alone)
        if config.bigram:
            pairs = script.bigram_rows(self.tokens, self.alone, len(model.bigram_table))
            bigram = F.embedding(pairs[:, -count:], model.bigram_table)
        if config.second_embedding:
            second = script.rms_norm(F.embedding(tokens, model.second_table), epsilon)
        x = x0 = embedded[:, -count:]
        if config.embedding_norm:
            x = x0 = script.rms_norm(x, epsilon)
        visible = self.masks(starts)
        outputs, first_value, kept = {}, None, {*model.skips.values(), *config.backout}
        for i, (block, layer) in enumerate(zip(model.blocks, model.plan, strict=True)):
            skip = model.skip(i, x0, outputs)
            x = x if skip is None else x + skip
            if block.residual is not None:
                x = block.residual * x + block.x0 * x0
            if block.bigram is not None:
                x = x + block.bigram * bigram
            if block.second is not None:
                x = x + block.second * second
            if block.attends:
                from_table = None if layer.table is None else F.embedding(tokens, model.value_tables[layer.table])
                normed, mask = script.rms_norm(x, epsilon), visible[layer.short, layer.paired]
                attended, own = self.attend(i, normed, mask, first_value, from_table)
                first_value = own if config.value_residual and i == 0 else first_value
                x = x + attended
            up, down = block.mlp.to(x.dtype).unbind(0)
            x = x + F.linear(script.rms_norm(x, epsilon), up).relu().square() @ down
            if i in kept:
                outputs[i] = x
        for source in config.backout:
            x = x - model.backout_mix * outputs[source]
        self.tokens, self.alone, self.count = self.tokens[:, -1:], self.alone[:, -1:], self.count + count
        return script.rms_norm(x, epsilon)

    def masks(self, starts: Tensor) -> dict[tuple[bool, bool], Tensor]:
        """(R, T) bool, the new tokens' document starts -> by kind of layer, which of the keys kept and of the new ones
        each new query sees, (R, 1, queries, keys) bool; paired layers have two positions for each token."""
        count, masks = starts.shape[1], {}
        position = torch.arange(self.count, self.count + count, device=starts.device)
        begins = starts & self.model.config.document_mask
        document = torch.maximum((position * begins).cummax(dim=1).values, self.document)  # (R, T)
        self.document = document[:, -1:]
        for layer, past in zip(self.model.plan, self.layers, strict=True):
            kind, each = (layer.short, layer.paired), 1 + layer.paired
            if past is None or kind in masks:
                continue
            query = torch.arange(each * self.count, each * (self.count + count), device=starts.device)
            key = torch.arange(each * self.count - past["key"].shape[1], each * (self.count + count),
                               device=starts.device)
            first = torch.maximum((each * document).repeat_interleave(each, dim=1), query - self.windows[layer.short])
            masks[kind] = ((first[..., None] <= key) & (key <= query[:, None]))[:, None]
        return masks

    def attend(self, i: int, x: Tensor, visible: Tensor, first_value: Tensor | None,
               from_table: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the attention of layer i adds to the stream at the new tokens, and its own values there."""
        block, layer, model, past = self.model.blocks[i], self.model.plan[i], self.model, self.layers[i]
        rows, tokens, _ = x.shape
        into, out = block.attention.to(x.dtype).split((3, 1))
        if block.into is not None:
            into, out = block.into * into, block.out * out
        query, key, own = F.linear(x, into.flatten(0, 1)).view(rows, tokens, 3 * block.heads, -1).chunk(3, dim=2)
        if block.qk_norm:
            query, key = script.rms_norm(query, block.epsilon), script.rms_norm(key, block.epsilon)
        done = self.count * (1 + block.paired)  # positions before these
        turns = [script.table_of(table[done:], tokens, block.heads, block.paired)
                 for table in (model.cosine, model.sine)]
        query, key, value = script.rotate(query, *turns) * model.scale, script.rotate(key, *turns), own
        if first_value is not None:
            value = torch.lerp(value, first_value, block.value_mix.to(value.dtype))
        if from_table is not None:
            share = 2 * script.gate(x, block.value_gate)[..., None] if block.value_gate is not None else 1
            value = value + share * from_table.view(value.shape)
        if block.offset:  # with the token before in front
            both = torch.cat((past["last"], key), 1)
            past["last"] = key[:, -1:]
            key = script.offset_keys(both, 2 * model.cosine.shape[-1], self.alone)[:, -tokens:]
        if block.paired:
            query, key, value = (part.reshape(rows, 2 * tokens, block.heads // 2, -1) for part in (query, key, value))
        key, value = torch.cat((past["key"], key), 1), torch.cat((past["value"], value), 1)
        past["key"], past["value"] = (part[:, -self.windows[layer.short]:] for part in (key, value))
        seen = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
                                              visible, scale=1.0)
        seen = seen.transpose(1, 2).reshape(rows, tokens, block.heads, -1)
        if block.attention_gate is not None:
            seen = seen * script.gate(x, block.attention_gate)[..., None]
        return F.linear(seen.flatten(2), out[0]), own


@torch.no_grad()
def all_hidden(model: GPT, tokens: Tensor, separator: int, windows: tuple[int, int]) -> Tensor:
    """(R, T) int32 -> (R, T, D): the model as training runs it, without a cache."""
    starts = tokens == separator
    return model(tokens, starts, script.attention_masks(model, starts, windows))


def drawn(logits: Tensor, temperature: float, top_k: int, draw: torch.Generator) -> int:
    """(V,) -> a token: the likeliest at temperature 0, else by chance, among the `top_k` likeliest if that is not 0."""
    logits = logits.double().cpu()
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    chances = torch.softmax((logits - logits.max()) / temperature, 0)  # finite at any temperature
    return int(torch.multinomial(chances, 1, generator=draw))


def generate(model: GPT, tokens: list[int], separator: int, windows: tuple[int, int], count: int, temperature: float,
             top_k: int = 0, seed: int = 0, cached: bool = True) -> Iterator[int]:
    """Yield `count` tokens after `tokens`, with or without the cache: the same ones but for rounding. The context is a
    row of training at most; when it is full, its older half is forgotten and the cache is filled anew."""
    draw, row = torch.Generator().manual_seed(seed), max(model.config.row_tokens)
    context, cache, new = list(tokens), None, []
    for _ in range(count):
        if len(context) > row:
            context, cache = context[-(row // 2):], None
        if cache is None:
            new = context
            cache = Cache(model, 1, windows) if cached else None
        inputs = torch.tensor([new], dtype=torch.int32, device=model.head.device)
        if cached:
            for part in inputs.split(CHUNK, dim=1):
                hidden = cache.advance(part, separator)
        else:
            hidden = all_hidden(model, inputs, separator, windows)
        new = [drawn(model.logits(hidden[0, -1]), temperature, top_k, draw)]
        context = context + new
        yield new[0]


def main(arguments: list[str] | None = None) -> None:
    """Command line. Raises Refusal for a file that is no checkpoint and for numbers out of range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="a model.pt or checkpoint_*.pt, or a run folder: its model.pt, else its newest checkpoint")
    parser.add_argument("--encoding", metavar="NAME|FILE", help="what the shards were made with, as for data/text.py "
                        "(default: bytes or gpt2, where the model has that vocabulary)")
    parser.add_argument("--prompt", action="append", metavar="TEXT",
                        help="what the text begins with (default: nothing); given several times, a text for each")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="length of a text (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest (default 0: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="S",
                        help="of the draws of the first text, the next one has S + 1 (default 0)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                        help="auto: the GPU if there is one")
    parser.add_argument("--no-cache", action="store_true",
                        help="go through the whole text again for each token: slow")
    options = parser.parse_args(arguments)
    limits = {"tokens": (1, 2**31, 200), "temperature": (0, 1e6, 0.8), "top_k": (0, 2**31, 40), "seed": (0, 2**62, 0)}
    for name, (low, high, example) in limits.items():
        value, flag = getattr(options, name), "--" + name.replace("_", "-")
        if not low <= value <= high:
            raise Refusal(f"{flag} {value} is out of range: expected {low} to {high:.0f}, for example {flag} {example}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda, but torch finds no GPU here; give --device cpu")
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    model, saved = script.load_model(model_file(options.checkpoint), device)
    separator, windows = saved["separator"], script.windows_at(saved["step"], model.config)
    encode, decode = encoding_of(saved["vocabulary"], separator, options.encoding)
    prompts = options.prompt or [""]
    settle(model)
    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        print("\n" + "-" * 72 if number else "", end="\n" * (number > 0))
        print(prompt, end="", flush=True)
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")  # keeps bytes that are half a character
        for token in generate(model, [separator, *encode(prompt)], separator, windows, options.tokens,
                              options.temperature, options.top_k, options.seed + number, not options.no_cache):
            print(text.decode(b"\n\n" if token == separator else decode(token)), end="", flush=True)
        print(text.decode(b"", final=True))
    count, seconds = options.tokens * len(prompts), time.perf_counter() - began
    print(f"{count:,} tokens in {seconds:.2f} s with their prompts, {count / seconds:,.0f} tokens/s on {device} in "
          f"{str(model.dtype)[6:]}, {'without' if options.no_cache else 'with'} cache", file=sys.stderr)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader of a pipe may leave early
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
