"""A language model in plain PyTorch: this file, config.json and model.safetensors beside it are all that it needs.

    from model import load                                  # torch is the only package
    model = load(FOLDER)                                    # device="cuda" puts it on a GPU
    logits = model.logits(torch.tensor([50256, 464, 3290])) # (T,) token numbers -> (T, vocabulary)

A text begins with the token config["separator"], as each document did in training. For inference only: no gradient,
no cache of keys and values. No standard Hugging Face class can hold this model; config.json names the reasons.
Shapes: T tokens, D width, H heads, K = D / H channels of a head, V vocabulary.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BLOCK = 512  # queries that attention takes at once


def load(folder: str | Path = Path(__file__).parent, device: str = "cpu") -> "Model":
    """The model that was exported to a folder."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return Model(config, {name: weight.to(device) for name, weight in read_tensors(folder).items()})


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """A safetensors file: the length of its header in 8 bytes, the header as JSON, then all numbers."""
    content = bytearray((Path(folder) / "model.safetensors").read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:begin]))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        numbers = torch.frombuffer(content, dtype=torch.uint8, count=last - first, offset=begin + first).clone()
        tensors[name] = numbers.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def gate(x: Tensor, weight: Tensor) -> Tensor:
    """(T, D) and (gates, n) or (n,) -> (T, gates) or (T,), each in (0, 1): from the first n channels."""
    return torch.sigmoid(x[:, :weight.shape[-1]] @ weight.to(x.dtype).movedim(-1, 0))


def before(x: Tensor) -> Tensor:
    """(T, ...) -> what stands one token before; the first keeps its own."""
    return torch.cat((x[:1], x[:-1]))


class Model:
    """config: the values in config.json; weights: the tensors by name."""

    def __init__(self, config: dict, weights: dict[str, Tensor]):
        self.config, self.weights = config, weights

    def norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.config["rms_epsilon"])

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """(T,) token numbers -> (T, V): row t is about the token that follows number t. Training had texts of up to
        config["longest_text"] tokens."""
        config, weights = self.config, self.weights
        if tokens.dim() != 1 or not all(0 <= token < config["vocabulary"] for token in tokens.tolist() or [-1]):
            raise ValueError(f"expected (T,) token numbers from 0 to {config['vocabulary'] - 1}, one or more; found "
                             f"{tuple(tokens.shape)}: {str(tokens.tolist())[:60]}")
        tokens = tokens.to(weights["head"].device).long()
        starts = tokens == config["separator"]
        alone = torch.zeros_like(starts) if config["looks_over_documents"] else starts.clone()
        alone[0] = True  # these take nothing up from the token before
        if config["attends_over_documents"]:
            starts = torch.zeros_like(starts)
        embedded = weights["head" if config["tied"] else "embedding"][tokens]
        if config["smear"]:
            share = weights["smear_mix"] * gate(embedded, weights["smear_gate"]).masked_fill(alone, 0)
            embedded = embedded + share.to(embedded.dtype)[:, None] * before(embedded)
        if config["bigram"]:
            pairs = weights["bigram_table"][self.bigram_rows(tokens, alone)]
        if config["second_embedding"]:
            second = self.norm(weights["second_table"][tokens])
        x = first = self.norm(embedded) if config["embedding_norm"] else embedded
        outputs, first_value = [], None
        for i, layer in enumerate(config["layers"]):
            own = {name.removeprefix(f"blocks.{i}."): weight for name, weight in weights.items()
                   if name.startswith(f"blocks.{i}.")}
            if layer["skip_from"] is not None:
                place = layer["skip_weight"]
                share = weights["skip_mix"][place]
                if config["gated_skip"]:
                    share = share.sigmoid() * 2 * gate(first, weights["skip_gate"][place])
                    share = share.to(x.dtype)[:, None]
                x = x + share * outputs[layer["skip_from"]]
            if config["embedding_shortcut"]:
                x = own["residual"] * x + own["x0"] * first
            if config["bigram"]:
                x = x + own["bigram"] * pairs
            if config["second_embedding"]:
                x = x + own["second"] * second
            if layer["attends"]:
                table = layer["value_table"]
                from_table = None if table is None else weights[f"value_tables.{table}"][tokens]
                added, value = self.attention(own, layer, self.norm(x), starts, alone, first_value, from_table)
                first_value = value if config["value_residual"] and i == 0 else first_value
                x = x + added
            up, down = own["mlp"]  # (4 D, D) both
            x = x + F.linear(self.norm(x), up).relu().square() @ down
            outputs.append(x)
        if config["backout"] is not None:
            x = x - weights["backout_mix"] * outputs[config["backout"]]
        raw = F.linear(self.norm(x), weights["head"])
        raw = raw if raw.dtype == torch.float64 else raw.float()
        height, extent, shift = config["softcap"]
        return height * torch.tanh((raw + shift) / extent) if height else raw

    def bigram_rows(self, tokens: Tensor, alone: Tensor) -> Tensor:
        """(T,) -> the row that each token shares with its predecessor; the last one where it has none. Products wrap
        around as 32-bit numbers do."""
        last = len(self.weights["bigram_table"]) - 1
        tokens = tokens.int()
        previous = before(torch.where(alone, last, tokens).int())
        return torch.where(alone, last, ((36_313 * tokens) ^ (27_191 * previous)) % last)

    def rotate(self, x: Tensor, paired: bool) -> Tensor:
        """Rotary position embedding of (T, H, K): channels j and j + n turn by the angle of their position, the rest
        stays still. In paired layers each token has two positions, its heads take them in turn."""
        frequency = torch.tensor(self.config["rotary_frequencies"], dtype=torch.float64, device=x.device)
        position = torch.arange(len(x), device=x.device)[:, None]
        if paired:
            position = 2 * position + torch.arange(x.shape[1], device=x.device) % 2
        angle = position[..., None] * frequency  # (T, H or 1, n)
        cosine, sine, turning = angle.cos().to(x.dtype), angle.sin().to(x.dtype), len(frequency)
        low, high, still = x.split((turning, turning, x.shape[-1] - 2 * turning), dim=-1)
        return torch.cat((low * cosine + high * sine, high * cosine - low * sine, still), dim=-1)

    def attention(self, own: dict[str, Tensor], layer: dict, x: Tensor, starts: Tensor, alone: Tensor,
                  first_value: Tensor | None, from_table: Tensor | None) -> tuple[Tensor, Tensor]:
        """What attention adds at each of (T, D), and this layer's own values (T, H, K)."""
        config, (tokens, width) = self.config, x.shape
        heads, paired = config["heads"], layer["paired"]
        query, key, value = (F.linear(x, matrix).view(tokens, heads, -1) for matrix in own["attention"][:3])
        own_value = value
        if config["qk_norm"]:
            query, key = self.norm(query), self.norm(key)
        query, key = self.rotate(query, paired) * config["softmax_scale"], self.rotate(key, paired)
        if first_value is not None:
            value = torch.lerp(value, first_value, own["value_mix"].to(value.dtype))
        if from_table is not None:
            share = 2 * gate(x, own["value_gate"])[..., None] if config["value_gates"] else 1
            value = value + share * from_table.view(value.shape)
        if layer["key_offset"]:  # the still channels of a key come from the token before
            moving, still = key.split((2 * len(config["rotary_frequencies"]), key.shape[-1]
                                       - 2 * len(config["rotary_frequencies"])), dim=-1)
            key = torch.cat((moving, torch.where(alone[:, None, None], still, before(still))), dim=-1)
        if paired:  # heads h and h + H / 2 of a token are two positions of one head
            query, key, value = (part.reshape(2 * tokens, heads // 2, -1) for part in (query, key, value))
            starts = torch.stack((starts, torch.zeros_like(starts)), dim=-1).flatten()
        seen = self.attend(query, key, value, starts, layer["window"]).reshape(tokens, heads, -1)
        if config["attention_gates"]:
            seen = seen * gate(x, own["attention_gate"])[..., None]
        return F.linear(seen.reshape(tokens, width), own["attention"][3]), own_value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, window: int) -> Tensor:
        """Softmax attention of (positions, heads, K), each position over those of its document that came before it, at
        most `window` back, and itself."""
        position = torch.arange(len(query), device=query.device)
        first = torch.maximum((position * starts).cummax(0).values, position - window)
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))  # (1, heads, positions, K)
        parts = []
        for begin in range(0, len(position), BLOCK):
            here = slice(begin, min(begin + BLOCK, len(position)))
            keys = slice(int(first[begin]), here.stop)
            mask = (first[here, None] <= position[keys]) & (position[keys] <= position[here, None])
            parts.append(F.scaled_dot_product_attention(query[:, :, here], key[:, :, keys], value[:, :, keys], mask,
                                                        scale=1.0))
        return torch.cat(parts, dim=2)[0].transpose(0, 1)
