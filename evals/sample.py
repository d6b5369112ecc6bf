"""Print text from a checkpoint that train_gpt2.py wrote, on CPU or GPU.

    python evals/sample.py logs/RUN/model.pt --prompt "ROMEO:" --tokens 200 --temperature 0.8 --seed 1
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt2 import (GPT, GPT2_SEPARATOR, GPT2_VOCABULARY, Refusal, attention_masks, load_model,  # noqa: E402
                        windows_at)

BYTES_VOCABULARY, BYTES_SEPARATOR = 257, 256


def encoding_of(vocabulary: int, separator: int):
    """(text -> token list, token list -> bytes) of what the shards were written with. Raises Refusal for others."""
    if (vocabulary, separator) == (BYTES_VOCABULARY, BYTES_SEPARATOR):
        return (lambda text: list(text.encode())), (lambda tokens: bytes(token for token in tokens if token < 256))
    if (vocabulary, separator) == (GPT2_VOCABULARY, GPT2_SEPARATOR):
        try:
            import tiktoken
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as error:  # noqa: BLE001  the loader lets its HTTP library's errors through
            raise Refusal(f"cannot load the GPT-2 encoding: {' '.join(str(error).split())[:200]}; run once with a "
                          "network, or set TIKTOKEN_CACHE_DIR to a folder that holds it") from None
        return gpt2.encode_ordinary, lambda tokens: b"".join(
            gpt2.decode_single_token_bytes(token) for token in tokens if token != separator)
    raise Refusal(f"the checkpoint has vocabulary {vocabulary} with separator {separator}, expected bytes "
                  f"({BYTES_VOCABULARY}, {BYTES_SEPARATOR}) or GPT-2 ({GPT2_VOCABULARY}, {GPT2_SEPARATOR})")


@torch.no_grad()
def generate(model: GPT, tokens: list[int], separator: int, count: int, temperature: float, seed: int):
    """Yield `count` tokens after `tokens`. Each is drawn on the CPU, so that a seed means the same on any device.

    Temperature 0 takes the likeliest token. The context is the last row_tokens tokens, as in training.
    """
    draw, device, tokens = torch.Generator().manual_seed(seed), model.embedding.device, list(tokens)
    row = max(model.config.row_tokens)
    for _ in range(count):
        context = torch.tensor(tokens[-row:], device=device, dtype=torch.int32)[None]
        starts = context == separator
        hidden = model(context, starts, attention_masks(model, starts, windows_at(model.config.steps, model.config)))
        logits = model.logits(hidden[0, -1]).float().cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=draw))
        tokens.append(token)
        yield token


def main(arguments: list[str] | None = None) -> None:
    """Command line. Raises Refusal for a file that is no checkpoint and for numbers out of range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a model.pt in a run folder")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what the text begins with (default: nothing)")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="length of the text (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: likeliest token (default 0.8)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default 0)")
    options = parser.parse_args(arguments)
    if options.tokens < 1:
        raise Refusal(f"--tokens {options.tokens} is out of range: expected 1 or more, for example --tokens 200")
    if not 0 <= options.temperature < float("inf"):
        raise Refusal(f"--temperature {options.temperature} is out of range: expected 0 or more, for example "
                      "--temperature 0.8")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, saved = load_model(options.checkpoint, device)
    encode, decode = encoding_of(saved["vocabulary"], saved["separator"])
    start = [saved["separator"], *encode(options.prompt)]
    text = list(generate(model, start, saved["separator"], options.tokens, options.temperature, options.seed))
    print(options.prompt + decode(text).decode(errors="replace"))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
