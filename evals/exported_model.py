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


class Model:
    """config: the values in config.json; weights: tensors by name. What has no weight here was not used."""

    def __init__(self, config: dict, weights: dict[str, Tensor]):
        self.config, self.weights = config, weights
        self.turning = 2 * len(config["rotary_frequencies"])  # channels of a head
        self.blocks = [{name.split(".", 2)[2]: weight for name, weight in weights.items()
                        if name.startswith(f"blocks.{i}.")} for i in range(len(config["layers"]))]

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
        if "smear_mix" in weights:
            share = weights["smear_mix"] * gate(embedding, weights["smear_gate"])
            share[0] = 0
            embedding = embedding + share.to(embedding.dtype)[:, None] * previous(embedding)
        x = x0 = self.norm(embedding)
        bigram = self.bigrams(tokens) if "bigram_table" in weights else None
        outputs, first_value = [], None
        for block, layer in zip(self.blocks, config["layers"], strict=True):
            if layer["skip_from"] is not None:
                share = weights["skip_mix"][layer["skip_weight"]]
                if "skip_gate" in weights:
                    share = share.sigmoid() * 2 * gate(x0, weights["skip_gate"])
                    share = share.to(x.dtype)[:, None]
                x = x + share * outputs[layer["skip_from"]]
            if "residual" in block:
                x = block["residual"] * x + block["x0"] * x0
            if bigram is not None:
                x = x + block["bigram"] * bigram
            if layer["attends"]:
                attended, value = self.attention(block, layer, self.norm(x), tokens, first_value)
                x = x + attended
                first_value = value if first_value is None else first_value
            up, down = block["mlp"]  # (4 D, D) both
            x = x + F.linear(self.norm(x), up).relu().square() @ down
            outputs.append(x)
        if config["backout"] is not None:
            x = x - weights["backout_mix"] * outputs[config["backout"]]
        z = F.linear(self.norm(x), weights["head"])
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        height, extent, shift = config["softcap"]
        return height * torch.tanh((z + shift) / extent) if height else z

    def bigrams(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T, D): the row of each token and the one before, by a hash that wraps in int32. The
        first token has the last row, and counts as that row's number for the second."""
        table = self.weights["bigram_table"]
        last, tokens = len(table) - 1, tokens.int()
        before = previous(tokens)
        before[:2] = last
        rows = ((36_313 * tokens) ^ (27_191 * before)) % last
        rows[0] = last
        return table[rows]

    def rotary(self, x: Tensor, paired: bool) -> Tensor:
        """(T, H, K): channels j and j + n turn by their position's angle, those from 2 n on stay still.
        In paired layers a token has two positions, which its heads take in turn."""
        frequency = torch.tensor(self.config["rotary_frequencies"], dtype=torch.float64, device=x.device)
        position = torch.arange(len(x), device=x.device)[:, None]
        if paired:
            position = 2 * position + torch.arange(x.shape[1], device=x.device) % 2
        angle = position[..., None] * frequency  # (T, H or 1, n)
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        low, high = x[..., :self.turning].chunk(2, dim=-1)
        turned = low * cosine + high * sine, high * cosine - low * sine
        return torch.cat((*turned, x[..., self.turning:]), dim=-1)

    def attention(self, block: dict[str, Tensor], layer: dict, x: Tensor, tokens: Tensor,
                  first_value: Tensor | None) -> tuple[Tensor, Tensor]:
        """What attention adds at each of (T, D), and this layer's own values (T, H, K)."""
        config, heads, paired = self.config, self.config["heads"], layer["paired"]
        starts, (length, width) = tokens == config["separator"], x.shape
        *qkv_weights, out_weight = block["attention"]
        query, key, value = (F.linear(x, weight).view(length, heads, -1) for weight in qkv_weights)
        own_value = value
        if config["qk_norm"]:
            query, key = self.norm(query), self.norm(key)
        query, key = self.rotary(query, paired) * config["softmax_scale"], self.rotary(key, paired)
        if "value_mix" in block:
            value = torch.lerp(value, first_value, block["value_mix"].to(value.dtype))
        if layer["value_table"] is not None:
            share = 2 * gate(x, block["value_gate"])[..., None] if "value_gate" in block else 1
            embedding = self.weights[f"value_tables.{layer['value_table']}"][tokens]
            value = value + share * embedding.view(value.shape)
        if layer["key_offset"]:  # still channels of a key come from the token before
            key = torch.cat((key[..., :self.turning], previous(key[..., self.turning:])), dim=-1)
        if paired:  # heads h and h + H / 2 of a token are two positions of one head
            query, key, value = (part.reshape(2 * length, heads // 2, -1) for part in (query, key, value))
            starts = torch.stack((starts, torch.zeros_like(starts)), dim=-1).flatten()
        out = self.attend(query, key, value, starts, layer["window"]).reshape(length, heads, -1)
        if "attention_gate" in block:
            out = out * gate(x, block["attention_gate"])[..., None]
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
