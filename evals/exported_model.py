"""A language model in plain PyTorch. It needs torch, and config.json and model.safetensors beside it.

    from model import load
    model = load()                                          # or load(FOLDER, device="cuda")
    logits = model.logits(torch.tensor([50256, 464, 3290])) # (T,) tokens -> (T, vocabulary)

A text begins with the token config["separator"], as each document did in training. For inference only:
no gradients, no cache. Shapes: T tokens, D width, H heads, K = D / H, V vocabulary.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16}
BLOCK = 512  # queries that attention takes at once


def load(folder: str | Path = Path(__file__).parent, device: str = "cpu") -> "Model":
    """The model that was exported to a folder."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return Model(config, {name: weight.to(device) for name, weight in read_tensors(folder).items()})


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """A safetensors file: the length of its header in 8 bytes, the header as JSON, all numbers."""
    content = bytearray((Path(folder) / "model.safetensors").read_bytes())
    begin, tensors = 8 + int.from_bytes(content[:8], "little"), {}
    for name, entry in json.loads(content[8:begin]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            numbers = torch.frombuffer(content, dtype=torch.uint8, count=last - first, offset=begin + first)
            tensors[name] = numbers.clone().view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def gate(x: Tensor, weight: Tensor) -> Tensor:
    """(T, D), (gates, n) or (n,) -> (T, gates) or (T,) in (0, 1), from the first n channels."""
    return torch.sigmoid(x[:, :weight.shape[-1]] @ weight.to(x.dtype).movedim(-1, 0))


def previous(x: Tensor) -> Tensor:
    """(T, ...) -> what stands one token before. The first keeps its own."""
    return torch.cat((x[:1], x[:-1]))


def pad_channels(part: Tensor, width: int) -> Tensor:
    """(T, n) -> (T, width): on the first n channels."""
    return F.pad(part, (0, width - part.shape[-1]))


def mudd(x: Tensor, part: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Weights (T, 1) that depend on the token, computed from the stream (T, D)."""
    hidden = F.gelu(F.linear(x, part["mudd.mudd_in"]))
    return (0.1 * F.linear(hidden, part["mudd.mudd_out"], part["mudd.mudd_bias"])).split(1, dim=-1)


def weighted(weights: tuple[Tensor, ...], streams: tuple[Tensor | None, ...]) -> Tensor:
    """The sum over the streams that there are."""
    return sum(weight * x for weight, x in zip(weights, streams, strict=True) if x is not None)


class Model:
    """config: the values in config.json; weights: tensors by name. What has no weight here was not used."""

    def __init__(self, config: dict, weights: dict[str, Tensor]):
        self.config, self.weights = config, weights
        self.rotary_channels = 2 * len(config["rotary_frequencies"])  # channels of a head
        self.blocks = [self.part(f"blocks.{i}.") for i in range(len(config["layers"]))]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): w for name, w in self.weights.items() if name.startswith(prefix)}

    def norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.config["rms_epsilon"])

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T, V): row t is about the token after token t. Training had texts of up to
        config["longest_text"] tokens."""
        config, weights, vocabulary = self.config, self.weights, self.config["vocabulary"]
        if tokens.dim() != 1 or not len(tokens) or not 0 <= tokens.min() <= tokens.max() < vocabulary:
            raise ValueError(f"expected (T,) token numbers from 0 to {vocabulary - 1}, one or more; found "
                             f"{tuple(tokens.shape)}: {str(tokens.tolist())[:60]}")
        tokens = tokens.to(weights["head"].device).long()
        embedding = weights.get("embedding", weights["head"])[tokens]
        if "entrance.smear_mix" in weights:
            share = weights["entrance.smear_mix"] * gate(embedding, weights["entrance.smear_gate"])
            share[0] = 0
            embedding = embedding + share.to(embedding.dtype)[:, None] * previous(embedding)
        x0, bigram = self.norm(embedding), None
        if "bigram_table" in weights:
            bigram = self.bigrams(tokens)
            x0 = x0 + pad_channels(self.blocks[0]["bigram_mix"] * bigram, x0.shape[-1])
        tables = {layer["value_table"]: weights[f"value_tables.{layer['value_table']}"][tokens]
                  for layer in config["layers"] if layer["value_table"] is not None}
        x, source, first_value, outputs = x0, None, None, []
        for i, (block, layer) in enumerate(zip(self.blocks, config["layers"], strict=True)):
            before, injected = x, 0
            if "x0_mix" in block:  # what the layer takes up of the embedding once more
                injected = block["x0_mix"] * x0
            if "bigram_mix" in block and i > 0:
                injected = injected + pad_channels(block["bigram_mix"] * bigram, x.shape[-1])
            if layer["skip_from"] is not None:
                share = block["skip_mix"]
                if "skip_gate" in block:
                    share = (2 * share.sigmoid() * gate(x0, block["skip_gate"])).to(x.dtype)[:, None]
                x = x + share * outputs[layer["skip_from"]]
            residual, output = (1, 1), (1, 1)
            if "output" in block:  # by sublayer; the output's weights are on the matrices
                residual = block["residual"]
            elif "residual" in block:  # once, before the block
                x, injected = block["residual"] * x + injected, 0
            normed, added = self.norm(x if source is None else source), 0
            embedding = tables.get(layer["value_table"])
            if embedding is not None:
                added = embedding.view(len(x), config["heads"], -1)
            if "value_gate" in block:
                half = block["value_gate"].shape[-1] // 2
                seen = torch.cat((normed[:, :half], embedding[:, :half]), dim=-1)
                added = 2 * gate(seen, block["value_gate"])[..., None] * added
            if "mudd.mudd_in" in block:  # all weights of this layer depend on the token
                mu, streams = mudd(x, block), (x0, source, x)
                halves = torch.cat(mu[6:8], dim=-1).repeat_interleave((config["heads"] + 1) // 2, dim=-1)
                added = halves[:, :config["heads"], None] * added
                added = added + weighted(mu[:3], streams).view(len(x), config["heads"], -1)
                x = x + weighted(mu[3:6], streams)
                residual, output, injected = (mu[8], mu[12]), (mu[9], mu[13]), mu[10] * x0
                if bigram is not None:
                    injected = injected + pad_channels(mu[11] * bigram, x.shape[-1])
            if "qk" in block:
                attended, value = self.attention(block, layer, normed, tokens, added, first_value)
                x = residual[0] * x + output[0] * attended
                first_value = value if first_value is None else first_value
            x = x + injected
            up, down = block["mlp"]  # (4 D, D) both
            down = block["output"][-1] * down if "output" in block else down
            hidden = F.linear(self.norm(x), up).relu().square() @ down
            x = residual[-1] * x + output[-1] * hidden
            outputs.append(x)
            if i == config["attention_source"]:
                source = x
        if "mudd.mudd_in" in weights:
            kept = None if config["kept"] is None else outputs[config["kept"]]
            x = x + weighted(mudd(x, weights), (x0, source, before, tables.get(0), kept))
        z = F.linear(self.norm(x), weights["head"])
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        height, extent, shift = config["softcap"]
        return height * torch.tanh((z + shift) / extent) if height else z

    def bigrams(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T, n): the row of each token and the one before, by a hash that wraps in int32, with
        the signs of that pair. The first token has the last row, and counts as that row's number for
        the second."""
        table, signs = self.weights["bigram_table"], self.weights.get("signs")
        last, tokens = len(table) - 1, tokens.int()
        before = previous(tokens)
        signed = 1 if signs is None else signs[(tokens ^ before) % len(signs)]
        before[:2] = last
        rows = ((36_313 * tokens) ^ (27_191 * before)) % last
        rows[0] = last
        return table[rows] * signed

    def rotary(self, x: Tensor, paired: bool) -> Tensor:
        """(T, H, K): channels j and j + n turn by their position's angle, those from 2 n on stay still.
        In paired layers a token has two positions, which its heads take in turn."""
        frequency = torch.tensor(self.config["rotary_frequencies"], dtype=torch.float64, device=x.device)
        position = torch.arange(len(x), device=x.device)[:, None]
        if paired:
            position = 2 * position + torch.arange(x.shape[1], device=x.device) % 2
        angle = position[..., None] * frequency  # (T, H or 1, n)
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        low, high = x[..., :self.rotary_channels].chunk(2, dim=-1)
        turned = low * cosine + high * sine, high * cosine - low * sine
        return torch.cat((*turned, x[..., self.rotary_channels:]), dim=-1)

    def attention(self, block: dict[str, Tensor], layer: dict, x: Tensor, tokens: Tensor, added: Tensor | int,
                  first_value: Tensor | None) -> tuple[Tensor, Tensor]:
        """What attention adds at each of (T, D), and this layer's own values (T, H, K). added: to the values."""
        config, heads, paired = self.config, self.config["heads"], layer["paired"]
        starts, (length, width) = tokens == config["separator"], x.shape
        qkv_weight = torch.cat((block["qk"].flatten(0, 1), block["vo"][0]))
        query, key, own_value = F.linear(x, qkv_weight).view(length, 3 * heads, -1).chunk(3, dim=1)
        if config["qk_norm"]:
            query, key = self.norm(query), self.norm(key)
        query, key = self.rotary(query, paired) * config["softmax_scale"], self.rotary(key, paired)
        value = own_value
        if "value_mix" in block and first_value is not None:
            value = torch.lerp(value, first_value, block["value_mix"].to(value.dtype))
        value = value + added
        if layer["key_offset"]:  # still channels of a key come from the token before
            key = torch.cat((key[..., :self.rotary_channels], previous(key[..., self.rotary_channels:])), dim=-1)
        parts = query, key, value
        if paired:  # heads h and h + H / 2 of a token are two positions of one head
            parts = [part.reshape(2 * length, heads // 2, -1) for part in parts]
            starts = torch.stack((starts, torch.zeros_like(starts)), dim=-1).flatten()
        out = self.attend(*parts, starts, layer["window"]).reshape(length, heads, -1)
        if "xsa" in block:  # heads leave out their part along the token's own value
            along = (out * value).sum(-1, keepdim=True) / value.square().sum(-1, keepdim=True).clamp_min(1e-8)
            out = out - block["xsa"].tanh().to(out.dtype)[:, None] * along * value
        if "attention_gate" in block:
            out = out * gate(x, block["attention_gate"])[..., None]
        out_weight = block["output"][0] * block["vo"][1] if "output" in block else block["vo"][1]
        return F.linear(out.reshape(length, width), out_weight), own_value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, window: int) -> Tensor:
        """Softmax attention of (positions, heads, K). Each position sees itself and those of its
        document that are at most `window` before it."""
        position, parts = torch.arange(len(query), device=query.device), []
        first = torch.maximum((position * starts).cummax(0).values, position - window)
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        for begin in range(0, len(position), BLOCK):
            here = slice(begin, min(begin + BLOCK, len(position)))
            keys = slice(int(first[begin]), here.stop)
            mask = (first[here, None] <= position[keys]) & (position[keys] <= position[here, None])
            parts.append(F.scaled_dot_product_attention(
                query[:, :, here], key[:, :, keys], value[:, :, keys], mask, scale=1.0))
        return torch.cat(parts, dim=2)[0].transpose(0, 1)
