"""The recipe of 83 records and of record 88 once more, from its written specification alone: by rows and
with dense masks, plain autograd, matrix by matrix, in float64; and the script against it through a run of
all stages. ("7.1") is a section of that specification. A name in `changed` alters the reference in one
place, to show that the comparison would notice."""

import copy
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tools import ALONE, made_up_prefixes, random_documents, small_model, write_shard
from torch import Tensor

import train_gpt2
from train_gpt2 import GPT, Batch, Config, TokenStream, optimizer_groups, phase_at, train_step

VOCABULARY, SEPARATOR = 257, 256
HEADS, WIDTH = 6, 48  # heads of 8 channels, of which 4 turn
SITES = (0, 1, 2, 3, 4, 5, 7, 8, 9)  # layers with weights for x0 and the bigram
PAIRED, LONG, XSA, TABLES = (0, 2, 5, 9), (3, 10), (1, 3, 4, 7, 8, 10), {1: 0, 2: 1, 8: 2, 9: 3, 10: 4}
SHORT_WINDOWS, LONG_WINDOWS = (12, 30, 50, 60), (40, 70, 110, 130)  # by stage, of the small run
DOCUMENTS, ROWS, STEP_TOKENS = (40, 90, 90, 90), (128, 256, 256, 256), (256, 512, 512, 512)
SETTINGS = dict(
    preset="gpt2", heads=HEADS, width=WIDTH, steps=20, extension=3 / 20, momentum_warmup=6 / 20,
    momentum_cooldown=4 / 20, window=LONG_WINDOWS, window_short=SHORT_WINDOWS, document_tokens=DOCUMENTS[:2],
    row_tokens=ROWS[:3], tokens_per_step=STEP_TOKENS[:3], rotary_base=1024.0**2,  # the slowest turns by 1 / 1024
    bigram=15, bigram_width=20, bigram_signs=37, loss_chunk=100)


# ---- rows: whole documents, cut (8) -----------------------------------------------------------------------


def rows_in_order(tokens: np.ndarray, sizes):
    """For each (n, cap): n + 1 tokens of documents of at most `cap` tokens. What is cut off is dropped."""
    documents, at = np.split(tokens, np.flatnonzero(tokens == SEPARATOR)[1:]), 0
    for n, cap in sizes:
        row = np.zeros(0, tokens.dtype)
        while len(row) < n + 1:
            row, at = np.concatenate((row, documents[at][:cap]))[:n + 1], at + 1
        yield torch.from_numpy(row.astype(np.int64))


# ---- schedules (6, 7.1, 8) --------------------------------------------------------------------------------


class Run(NamedTuple):
    scheduled: int  # S
    extension: int
    rise: int  # of the momentum
    fall: int


FULL, SMALL = Run(1365, 10, 300, 50), Run(17, 3, 6, 4)


def schedule(t: int, run: Run, changed=()) -> dict:
    end, tied_until = run.scheduled, 0
    nearest = math.ceil if "border rounded up" in changed else round
    borders = [0, nearest(end / 3), nearest(2 * end / 3), end, end + run.extension]
    stage = max(k for k in range(4) if t >= borders[k])
    phi = (t - borders[stage]) / (borders[stage + 1] - borders[stage])
    weights = [(1, 0.5, 0.25 * (1 - phi)), (1, 0.5 * (1 - phi)), (1,), (1,)][stage]
    prefix = [0.25, 0.25 * (1 - phi), 0, 0][stage]
    if stage == 1 and "prefix weight constant in stage 1" in changed:
        prefix = 0.25
    of_level = stage - (t == borders[stage] and 0 < stage < 3) * ("level one step late" in changed)
    begin = int(0.4 * end)
    tau = min(1, max(0, t - begin) / (end - begin))
    rate = (1, 1.52, 1.73, 0)[of_level] * (1 - tau) + 0.15 * tau
    last = end + run.extension - run.fall
    momentum = 0.95
    if t < run.rise:
        momentum = 0.85 + 0.10 * t / run.rise
    elif t > last:
        momentum = 0.95 - 0.10 * (t - last) / run.fall
    while tied_until < 2 * end / 3 or tied_until % 2 == 0:
        tied_until += 1
    if "untied an update early" in changed:
        tied_until -= 2
    return dict(stage=stage, weights=weights, prefix=prefix, rate=rate, momentum=momentum, tied=t <= tied_until,
                last_tied=t == tied_until)


# ---- forward (3 to 6) -------------------------------------------------------------------------------------


def normed(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def wrapped(product: int) -> int:
    """As int32 has it."""
    return (product + 2**31) % 2**32 - 2**31


def bigram_index(tokens: list[int], t: int, rows: int) -> int:
    before = tokens[t - 1] if t > 1 else rows - 1
    return (wrapped(36313 * tokens[t]) ^ wrapped(27191 * before)) % (rows - 1) if t else rows - 1


def sign_index(tokens: list[int], t: int, rows: int) -> int:
    return (tokens[t] ^ tokens[t - 1]) % rows if t else 0


def rotary_and_scale(stage: int, turning: int = 2) -> tuple[Tensor, float]:
    f, scale = torch.tensor([1024.0 ** (-k / (turning - 1)) for k in range(turning)], dtype=torch.float64), 0.1
    for old, new in zip(LONG_WINDOWS[:stage], LONG_WINDOWS[1:], strict=False):
        g = ((old * f / (2 * math.pi) - 1) / 31).clamp(0, 1)
        f, scale = f * (old / new + g * (1 - old / new)), scale * (1 + 0.2 * math.log(new / old))
    return f, scale


def turned(x: Tensor, position: Tensor, f: Tensor) -> Tensor:
    """(T, H, K) at positions (T, H): channels j and j + n, in the first half of a head."""
    n, angle = len(f), position[:, :, None] * f
    one, other, still = x[..., :n], x[..., n:2 * n], x[..., 2 * n:]
    return torch.cat((one * angle.cos() + other * angle.sin(), other * angle.cos() - one * angle.sin(), still), -1)


def attended(q: Tensor, k: Tensor, v: Tensor, document: Tensor, window: int) -> Tensor:
    """(T, K) each: one head; queries carry the scale."""
    place = torch.arange(len(q))
    back = place[:, None] - place
    seen = (back >= 0) & (back <= window) & (document[:, None] == document)
    return (q @ k.T).masked_fill(~seen, -math.inf).softmax(-1) @ v


def attention_layer(i: int, h: Tensor, w: dict, term, document: Tensor, stage: int, changed) -> Tensor:
    """term: (T, H, K), added to the values, or None."""
    own = {name: w[f"blocks.{i}.{name}"] for name in ("qk", "vo", "in_scale", "out_scale", "attention_gate")}
    tokens, half = len(h), HEADS // 2
    matrices = (own["qk"][:half].reshape(WIDTH, WIDTH), own["qk"][half:].reshape(WIDTH, WIDTH), own["vo"][0])
    q, k, v = ((h @ (own["in_scale"] * matrix).T).unflatten(-1, (HEADS, -1)) for matrix in matrices)
    f, scale = rotary_and_scale(stage)
    position = torch.arange(tokens)[:, None].expand(-1, HEADS)
    if i in PAIRED:
        position = 2 * position + torch.arange(HEADS) % 2
    q, k = scale * turned(normed(q), position, f), turned(normed(k), position, f)
    if i in LONG:
        shifted = k.clone()
        shifted[1:, :, k.shape[-1] // 2:] = k[:-1, :, k.shape[-1] // 2:]
        k = shifted
    bare, v = v, v if term is None else v + term
    window = (LONG_WINDOWS if i in LONG else SHORT_WINDOWS)[stage] - ("window one less" in changed)
    if i in PAIRED:
        y = torch.empty_like(v)
        for s in range(half):  # three streams of twice the length
            streams = (x[:, [s, s + half]].flatten(0, 1) for x in (q, k, v))
            out = attended(*streams, document.repeat_interleave(2), window)
            y[:, s], y[:, s + half] = out[0::2], out[1::2]
    else:
        y = torch.stack([attended(q[:, n], k[:, n], v[:, n], document, window) for n in range(HEADS)], 1)
    if i in XSA and "no XSA" not in changed:
        u = bare if "XSA without the value term" in changed else v
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-4)
        y = y - w[f"blocks.{i}.xsa"].tanh()[:, None] * (y * u).sum(-1, keepdim=True) * u
    y = y * (h[:, :12] @ own["attention_gate"].T).sigmoid()[..., None]
    return y.flatten(1) @ (own["out_scale"] * own["vo"][1]).T


def mudd(w: dict, prefix: str, x: Tensor, changed) -> Tensor:
    """(T, D) -> (coefficients, T, 1)."""
    if "static" in changed:
        r = math.sqrt(1.1)
        values = [0, -0.5, 0, 0, 0] if not prefix else [0, 0, 0, 0, 0, 0, 2, 2, r, 1, 0, 0.05, r, 1]
        return torch.tensor(values, dtype=x.dtype)[:, None, None].expand(-1, len(x), 1)
    hidden = x @ w[f"{prefix}mudd.mudd_in"].T
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return (0.1 * (hidden @ w[f"{prefix}mudd.mudd_out"].T + w[f"{prefix}mudd.mudd_bias"])).T[..., None]


def mlp(w: dict, i: int, x: Tensor) -> Tensor:
    up, down = w[f"blocks.{i}.mlp"]
    return (normed(x) @ up.T).relu() ** 2 @ down


def hidden_states(w: dict, signs: Tensor, tokens: Tensor, stage: int, tied: bool, changed=()) -> Tensor:
    """(T,) tokens of a row -> (T, D), ready for the head."""
    listed, document = tokens.tolist(), (tokens == SEPARATOR).cumsum(0)
    e = w["head" if tied else "embedding"][tokens]
    if "no smear" not in changed:
        opened = w["entrance.smear_mix"] * (e[1:, :12] @ w["entrance.smear_gate"]).sigmoid()
        e = torch.cat((e[:1], e[1:] + opened[:, None] * e[:-1]))
    table = w["bigram_table"]
    b = table[[bigram_index(listed, t, len(table)) for t in range(len(listed))]]
    if "no sign" not in changed:
        b = b * signs[[sign_index(listed, t, len(signs)) for t in range(len(listed))]]
    b = torch.nn.functional.pad(b, (0, WIDTH - b.shape[1]))
    m, n = w["entrance.x0_mix"], w["entrance.bigram_mix"]
    x0 = normed(e)
    x = x0 + n[0] * b
    if "x0 without injection" not in changed:
        x0 = x
    c0, ve = x0, {i: w[f"value_tables.{number}"][tokens] for i, number in TABLES.items()}
    c3 = c7 = None
    for i in range(10):
        own = {name.split(".")[-1]: p for name, p in w.items() if name.startswith(f"blocks.{i}.")}
        r, p = own["residual"], own["output"]
        if i == 6:
            seen = x if "skip gate from x" in changed else x0
            x = x + own["skip_mix"].sigmoid() * 2 * (seen[:, :12] @ own["skip_gate"]).sigmoid()[:, None] * c3
        else:
            from_x = i <= 7 or (i == 9 and "attention of layer 9 from x" in changed)
            h, term = normed(x if from_x else c7), None
            if i in TABLES:
                seen = h[:, :12] if "value gate without ve" in changed else torch.cat((h[:, :6], ve[i][:, :6]), 1)
                term = 2 * (seen @ own["value_gate"].T).sigmoid()[..., None] * ve[i].unflatten(-1, (HEADS, -1))
            out = attention_layer(i, h, w, term, document, stage, changed)
            site = SITES.index(i)
            if "mixture before attention's weight" in changed:
                x = r[0] * (x + m[site] * x0) + p[0] * out
            else:
                x = r[0] * x + p[0] * out + m[site] * x0
            if i:
                x = x + n[site] * b
        x = r[-1] * x + p[-1] * mlp(w, i, x)
        c3, c7 = x if i == 3 else c3, x if i == 7 else c7
    c9, h, mu = x, normed(c7), mudd(w, "blocks.10.", x, changed)
    moved = (1 + mu[5]) * x + mu[3] * c0 + mu[4] * c7
    old = moved if "stream weights before values read x" in changed else x
    of_head = torch.cat((mu[6].expand(-1, HEADS // 2), mu[7].expand(-1, HEADS // 2)), 1)[..., None]
    mixed = mu[0] * c0 + mu[1] * c7 + mu[2] * old
    term = of_head * ve[10].unflatten(-1, (HEADS, -1)) + mixed.unflatten(-1, (HEADS, -1))
    x = mu[8] * moved + mu[9] * attention_layer(10, h, w, term, document, stage, changed) + mu[10] * c0
    x = x + mu[11] * b
    x = mu[12] * x + mu[13] * mlp(w, 10, x)
    mu = mudd(w, "", x, changed)
    last = ve[2] if "another table before the head" in changed else ve[1]
    return normed(x + mu[0] * c0 + mu[1] * c7 + mu[2] * c9 + mu[3] * last + mu[4] * c3)


# ---- loss (9) ---------------------------------------------------------------------------------------------


def row_loss(w: dict, signs: Tensor, prefixes, row: Tensor, now: dict, changed=()) -> tuple[Tensor, Tensor]:
    """The sums over a row, (n + 1,) tokens: the weighted loss, and that of the next token alone."""
    x = hidden_states(w, signs, row[:-1], now["stage"], now["tied"], changed)
    rows = VOCABULARY if "no padding" in changed else None
    z = 23 * ((x @ w["head"][:rows].T + 5) / 7.5).sigmoid()  # of all V, the padding too
    surprise = z.logsumexp(-1, keepdim=True) - z  # of every token at every position
    total = 0
    for k, weight in enumerate(now["weights"]):
        target = row[1 + k:]
        total = total + weight * surprise[torch.arange(len(target)), target].sum()
    prefix = torch.as_tensor(prefixes)[row[1:]].long()
    known = (prefix >= 0).nonzero()[:, 0]
    total = total + now["prefix"] * surprise[known, prefix[known]].sum()
    return total, surprise[torch.arange(len(x)), row[1:]].sum()


# ---- optimizers (7) ---------------------------------------------------------------------------------------

_, POLAR_EXPRESS = train_gpt2.ORTHOGONALISERS["polar-express"]  # as today: test_optimizers has its own copy
ADAM = {  # rate at s = 1, beta1, beta2, decay
    "head": (0.008, 0.5, 0.95, 0.75), "embedding": (0.008, 0.5, 0.95, 0.75),
    "value_tables": (0.6, 0.75, 0.95, 0.025), "bigram_table": (0.6, 0.75, 0.95, 0.025),
    "attention_gate": (0.008, 0.9, 0.99, 0.005), "value_gate": (0.008, 0.9, 0.99, 0.005),
    "smear_gate": (0.00008, 0.9, 0.99, 0), "skip_gate": (0.0004, 0.9, 0.99, 0),
    **dict.fromkeys(("in_scale", "out_scale", "smear_mix", "skip_mix"), (0.04, 0.9, 0.99, 0)),
    "residual": (0.04, 0.9, 0.95, 0), **dict.fromkeys(("output", "x0_mix", "bigram_mix", "xsa"), (0.008, 0.9, 0.95, 0)),
    "mudd_in": (0.002, 0.9, 0.99, 0.005), "mudd_out": (0.002, 0.9, 0.99, 0.005), "mudd_bias": (0.002, 0.9, 0.99, 0)}


def kind_of(name: str) -> str:
    return [word for word in name.split(".") if not word.isdigit()][-1]


def polar_express(g: Tensor) -> Tensor:
    x = g / (1.02 * g.norm())
    for a, b, c in POLAR_EXPRESS:
        square = x.T @ x if len(x) > x.shape[1] else x @ x.T
        y = b * square + c * square @ square
        x = a * x + (x @ y if len(x) > x.shape[1] else y @ x)
    return x


class Trainer:
    """Weights, and what the optimizers remember."""

    def __init__(self, model: GPT, prefixes, changed=()):
        self.w = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.signs, self.prefixes, self.changed = model.signs.clone(), prefixes, changed
        self.averages, self.statistics = {}, {}
        self.mean, self.square, self.summed = (
            {name: torch.zeros_like(p) for name, p in self.w.items()} for _ in range(3))

    def step(self, t: int, rows: list[Tensor]) -> float:
        now, leaves = schedule(t, SMALL, self.changed), {n: p.clone().requires_grad_() for n, p in self.w.items()}
        reported = 0.0
        for row in rows:
            loss, next_token = row_loss(leaves, self.signs, self.prefixes, row, now, self.changed)
            (loss / STEP_TOKENS[0]).backward()
            reported += next_token.item()
        for name, p in leaves.items():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            if kind_of(name) in ("qk", "vo", "mlp"):
                self.muon(name, gradient, now)
                continue
            self.summed[name] += gradient
            if t % 2 == ("Adam at even steps" not in self.changed) and not (name == "embedding" and now["tied"]):
                self.adam(name, now["rate"], (t + 1) // 2 + ("Adam at even steps" in self.changed))
                self.summed[name].zero_()
        if now["last_tied"]:
            self.w["embedding"], self.summed["embedding"] = self.w["head"].clone(), self.summed["head"].clone()
            if "moments not copied" not in self.changed:
                for moment in (self.mean, self.square):
                    moment["embedding"] = moment["head"].clone()
        return reported / sum(len(row) - 1 for row in rows)

    def muon(self, name: str, gradient: Tensor, now: dict) -> None:
        rate, factors = 0.023 * now["rate"], (1,) * 6
        if kind_of(name) == "mlp":
            factors = (2, 2) if "factor 2 for W2" in self.changed else (2, 4)
        old, g = self.w[name], gradient
        if kind_of(name) == "qk" and "QK orthogonalised whole" in self.changed:
            old, g = old.reshape(2, WIDTH, WIDTH), g.reshape(2, WIDTH, WIDTH)
        new = torch.empty_like(old)
        for j, factor in zip(range(len(old)), factors, strict=False):
            mu, average = now["momentum"], self.averages.get((name, j), 0)
            average = self.averages[name, j] = mu * average + (1 - mu) * g[j]
            step = polar_express(mu * average + (1 - mu) * g[j])
            wide = step.shape[0] < step.shape[1]
            axis = 0 if wide != ("statistic over the other axis" in self.changed) else 1
            beta = 0.95 if "beta2 as before" in self.changed else 0.9
            statistic = beta * self.statistics.get((name, j), 0) + (1 - beta) * step.square().mean(axis, keepdim=True)
            self.statistics[name, j] = statistic
            even = step / statistic.clamp_min(1e-10).sqrt()
            if "norm not kept" not in self.changed:
                even = even * step.norm() / even.norm()
            shrinks = torch.ones_like(even) if "decay everywhere" in self.changed else even * old[j] > 0
            new[j] = old[j] - factor * rate * even - factor * 1.2 * rate**2 * old[j] * shrinks
        self.w[name] = new.reshape(self.w[name].shape)

    def adam(self, name: str, s: float, count: int) -> None:
        rate, beta1, beta2, decay = ADAM["value_tables" if "value_tables" in name else kind_of(name)]
        rate, g, old = rate * s, self.summed[name], self.w[name]
        mean = self.mean[name] = beta1 * self.mean[name] + (1 - beta1) * g
        square = self.square[name] = beta2 * self.square[name] + (1 - beta2) * g * g
        step = rate * mean / (1 - beta1**count) / ((square / (1 - beta2**count)).sqrt() + 1e-10 / 16_384)
        self.w[name] = old - step - rate**2 * decay * old * (step * old > 0)


# ---- the script against it --------------------------------------------------------------------------------


def batch_of(rows: list[Tensor]) -> Batch:
    rows = torch.stack(rows)
    return Batch(rows[:, :-1].int(), rows[:, 1:], rows[:, :-1] == SEPARATOR)


def worst(found: dict, expected: dict) -> float:
    """The largest difference in a tensor, as a share of its largest entry, of all tensors."""
    assert found.keys() == expected.keys()
    return max(((found[name].detach() - p).abs().max() / p.abs().max()).item() for name, p in expected.items())


def randomised() -> tuple[GPT, np.ndarray]:
    return small_model(VOCABULARY, spread=0.1, **SETTINGS), made_up_prefixes(VOCABULARY)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    tokens = random_documents(40_000, VOCABULARY, SEPARATOR, seed=3)
    path = write_shard(tmp_path_factory.mktemp("shards") / "text_train_0.bin", tokens, VOCABULARY, SEPARATOR)
    return tokens, TokenStream(str(path))


def rows_by_step(tokens: np.ndarray, changed=()) -> list[list[Tensor]]:
    stages = [schedule(t, SMALL)["stage"] for t in range(20)]
    caps = (90,) * 4 if "document cap constant" in changed else DOCUMENTS
    rows = rows_in_order(tokens, [(ROWS[k], caps[k]) for k in stages for _ in range(2)])
    return [[next(rows), next(rows)] for _ in stages]


def test_a_run_of_all_stages(stream):
    """Losses and all weights, tied and untied; from weights none of which is neutral."""
    model, prefixes = randomised()
    trainer, groups, tables = Trainer(model, prefixes), optimizer_groups(model, ALONE), []
    start, rows = copy.deepcopy(trainer.w), rows_by_step(stream[0])
    batches = train_gpt2.step_batches(stream[1], model.config, ALONE)
    for t, batch in enumerate(batches):
        expected = batch_of(rows[t])
        assert all(torch.equal(a, b) for a, b in zip(batch[:3], expected[:3], strict=True)), t
        assert train_step(model, groups, batch, t).item() == pytest.approx(trainer.step(t, rows[t]), rel=1e-11), t
        tables.append(torch.equal(model.head, model.embedding))
    assert t == 19 and tables == [False] * 13 + [True] * 2 + [False] * 5  # before, the embedding stands aside
    for name, p in trainer.w.items():
        assert (p - start[name]).abs().max() > 1e-5, name
    assert worst(dict(model.named_parameters()), trainer.w) < 1e-9


FORWARD = ("no XSA", "XSA without the value term", "value gate without ve", "stream weights before values read x",
           "x0 without injection", "no sign", "no smear", "attention of layer 9 from x", "skip gate from x", "static",
           "mixture before attention's weight", "another table before the head", "window one less", "no padding")
UPDATE = ("statistic over the other axis", "QK orthogonalised whole", "beta2 as before", "norm not kept",
          "factor 2 for W2", "decay everywhere", "Adam at even steps", "moments not copied", "untied an update early")
SCHEDULE = ("level one step late", "border rounded up", "prefix weight constant in stage 1", "untied an update early")


def altered(ways):
    """One in the default suite: could the test fail? All of them in the slow one."""
    return [ways[0], *(pytest.param(way, marks=pytest.mark.slow) for way in ways[1:])]


@torch.no_grad()
@pytest.mark.parametrize("changed", [(), *altered(FORWARD)])
def test_a_forward_pass_with_one_thing_altered_is_another(stream, changed):
    model, prefixes = randomised()
    row, weights = rows_by_step(stream[0])[7][0], dict(model.named_parameters())
    found = model.loss(batch_of([row]), phase_at(7, model.config))
    expected = row_loss(weights, model.signs, prefixes, row, schedule(7, SMALL), (changed,))
    for pair in zip(found, expected, strict=True):
        difference = abs(pair[0].item() / pair[1].item() - 1)
        assert difference > 1e-7 if changed else difference < 1e-13


@pytest.fixture(scope="module")
def updated(stream):
    """The rows of four short steps around the untying, and the weights after them."""
    model, _ = randomised()
    groups = optimizer_groups(model, ALONE)
    rows = dict(zip(range(12, 16), ([row] for row, _ in rows_by_step(stream[0])), strict=False))
    for t in rows:
        train_step(model, groups, batch_of(rows[t]), t)
    return rows, dict(model.named_parameters())


@pytest.mark.parametrize("changed", [(), *altered(UPDATE)])
def test_updates_with_one_thing_altered_are_others(updated, changed):
    rows, found = updated
    trainer = Trainer(*randomised(), (changed,))
    for t in rows:
        trainer.step(t, rows[t])
    difference = worst(found, trainer.w)
    assert difference > 1e-5 if changed else difference < 1e-10


@pytest.mark.parametrize("changed", [(), *altered(SCHEDULE)])
def test_schedules_with_one_thing_altered_are_others(changed):
    """In every step of the run of 1375 steps, and of the small one."""
    for run, config in ((FULL, Config()), (SMALL, randomised()[0].config)):
        same = True
        for t in range(config.steps):
            now, phase = schedule(t, run, (changed,)), phase_at(t, config)
            found = [train_gpt2.learning_rate_factor(t, config), train_gpt2.momentum_at(t, config), phase.prefix_weight,
                     phase.stage, phase.tied, *phase.token_weights]
            expected = [now["rate"], now["momentum"], now["prefix"], now["stage"], now["tied"], *now["weights"]]
            same &= len(found) == len(expected) and found == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert same == (not changed or (run is FULL and changed == "border rounded up"))  # 1365 is thrice 455


def test_rows_with_one_cap_are_others(stream):
    first, other = (rows_by_step(stream[0], changed)[0][0] for changed in ((), ("document cap constant",)))
    assert not torch.equal(first, other)


# ---- numbers and unit checks (2, 3, 7.1, 8, 13) -----------------------------------------------------------


def test_the_numbers_of_the_specification():
    """Those of the reference itself, which is held against the script above."""
    tokens = [50256, 464, 2068, 7586, 21831, 50256, 11]
    assert [bigram_index(tokens, t, 754_560) for t in range(7)] == [754559, 22202, 28717, 559816, 127596, 73724, 137718]
    assert [sign_index(tokens, t, 8192) for t in range(7)] == [0, 1408, 2500, 5558, 2277, 4375, 1115]
    rates = {454: 1, 455: 1.52, 546: 1.52, 547: 1.518327, 909: 0.912784, 910: 1.027778, 1000: 0.854151,
             1250: 0.371856, 1364: 0.151929, 1365: 0.15}
    assert {t: round(schedule(t, FULL)["rate"], 6) for t in rates} == rates
    assert schedule(1374, FULL)["momentum"] == pytest.approx(0.852)
    assert [t for t in range(1375) if schedule(t, FULL)["last_tied"]] == [911]


def test_shapes_of_the_full_size():
    with torch.device("meta"):
        shapes = {name: (*p.shape,) for name, p in GPT(Config(dtype="bfloat16"), 50257).named_parameters()}
    d, attending = 768, [i for i in range(11) if i != 6]
    expected = {"embedding": (50304, d), "head": (50304, d), "bigram_table": (754_560, 192), "entrance.x0_mix": (9,),
                "entrance.bigram_mix": (9,), "entrance.smear_mix": (), "entrance.smear_gate": (12,),
                "blocks.6.skip_mix": (), "blocks.6.skip_gate": (12,)}
    expected |= {f"value_tables.{k}": (50304, d) for k in range(5)}
    expected |= {f"blocks.{i}.mlp": (2, 3072, d) for i in range(11)}
    for name, shape in (("qk", (6, 256, d)), ("vo", (2, d, d)), ("in_scale", ()), ("out_scale", ()),
                        ("attention_gate", (6, 12))):
        expected |= {f"blocks.{i}.{name}": shape for i in attending}
    expected |= {f"blocks.{i}.{name}": (1 + (i != 6),) for i in range(10) for name in ("residual", "output")}
    expected |= {f"blocks.{i}.xsa": (6,) for i in XSA} | {f"blocks.{i}.value_gate": (6, 12) for i in (1, 2, 8, 9)}
    for prefix, count in (("blocks.10.", 14), ("", 5)):
        expected |= {f"{prefix}mudd.mudd_in": (64, d), f"{prefix}mudd.mudd_out": (count, 64),
                     f"{prefix}mudd.mudd_bias": (count,)}
    assert shapes == expected


@torch.no_grad()
def test_a_fresh_model_is_a_static_one(stream):
    """Coefficients are their biases; XSA, smear and signs do nothing. The first loss of the vocabulary of
    GPT-2 is about 10.83."""
    model = small_model(VOCABULARY, **SETTINGS)
    row = rows_by_step(stream[0])[7][0]
    plain = ("static", "no XSA", "no smear", "no sign")
    found = model.loss(batch_of([row]), phase_at(7, model.config))[1]
    expected = row_loss(dict(model.named_parameters()), model.signs, made_up_prefixes(VOCABULARY), row,
                        schedule(7, SMALL), plain)[1]
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    model = small_model(50257, "float32", **SETTINGS | dict(bigram=1))
    text = torch.randint(50257, (2, 129), generator=torch.Generator().manual_seed(0))
    assert model.loss(batch_of([*text]), phase_at(0, model.config))[1].item() / 256 == pytest.approx(10.83, abs=0.01)


@torch.no_grad()
def test_the_stream_begins_as_x0_itself(stream):
    model, _ = randomised()
    seen = []
    for name in ("run_entrance", "run_attention", "run_final"):
        part = getattr(model, name)
        setattr(model, name, lambda first, *others, part=part: seen.append(others) or part(first, *others))
    model.loss(batch_of(rows_by_step(stream[0])[0]), phase_at(0, model.config))
    (_, bigram, signs), (x, shared, *_), (_, streams, _) = seen[0], seen[1], seen[-1]
    assert len(seen) == 13 and x is shared.x0 and x is streams[0]
    injected = model.entrance.bigram_mix[0] * bigram * signs
    assert (x - normed(x)).abs().max() > 1e-3 and injected.abs().max() > 1e-3  # it is in there, after the norm
    assert all(arguments[1].x0 is x for arguments in seen[1:12])


def test_updates_of_queries_and_keys_are_six_orthogonal_factors_of_one_norm():
    update = torch.randn(6, 256, 768, generator=torch.Generator().manual_seed(0))
    factors = train_gpt2.orthogonalise(update, "polar-express", torch.float32)
    values = torch.linalg.svdvals(factors)
    assert values.shape == (6, 256) and 0.85 < values.min() and values.max() < 1.15
    torch.testing.assert_close(factors[4].double(), polar_express(update[4].double()).double(), rtol=1e-3, atol=1e-4)
    statistic = torch.zeros(6, 1, 768)
    even = train_gpt2.normuon(factors, statistic, 0.9)
    torch.testing.assert_close(even.norm(dim=(1, 2)), factors.norm(dim=(1, 2)), rtol=1e-5, atol=0)
    torch.testing.assert_close(statistic, 0.1 * factors.square().mean(1, keepdim=True), rtol=1e-5, atol=0)
    columns = even.square().mean(1)
    torch.testing.assert_close(columns, columns.mean(1, keepdim=True).expand_as(columns), rtol=1e-4, atol=0)
