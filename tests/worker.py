"""What test_processes.py starts in several processes: torchrun ... worker.py TASK. Its jobs come in a file."""

import json
import os
import sys
from pathlib import Path

import train_gpt2


def jobs(path: str) -> None:
    """A file {"train": [command line, ...], "models": [path, ...], "micro": [rows, ...]}: train each, then validate
    each model with each micro size. Process 0 writes {model: {rows: loss}} beside it, as validated.json."""
    job = json.loads(Path(path).read_text())
    configs = [train_gpt2.parse_command_line(arguments) for arguments in job["train"]]
    processes = train_gpt2.start_processes(configs[0])
    for config in configs:
        train_gpt2.train(config, processes)
    validated = {}
    for name in job["models"]:
        model, saved = train_gpt2.load_model(name)
        stream = train_gpt2.TokenStream(model.config.val_files)
        tokens = model.config.val_tokens
        validated[name] = {rows: train_gpt2.validate(model, stream, tokens, rows, saved["step"], processes)
                           for rows in job["micro"]}
    if processes.rank == 0:
        Path(path).with_name("validated.json").write_text(json.dumps(validated))


def order(out: str, *arguments: str) -> None:
    """One step in two micro-batches. Each process writes what happened in which order, as OUT/order_RANK.json."""
    config = train_gpt2.parse_command_line(list(arguments))
    processes = train_gpt2.start_processes(config)
    stream = train_gpt2.TokenStream(config.train_files)
    model, events = train_gpt2.GPT(config, stream.vocabulary, train_gpt2.compute_dtype(config, processes.device)), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(["gradient", name]))

    def reduce(group):
        idle = group.work is None
        real_reduce(group)
        if idle and group.work is not None:
            events.append(["reduce", group.name])

    def wait(group):
        events.append(["wait", group.name])
        real_wait(group)

    def apply_updates(*anything):
        events.append(["backward", "ended"])
        real_apply_updates(*anything)

    Group = train_gpt2.Group
    real_reduce, real_wait, real_apply_updates = Group.reduce, Group.wait, train_gpt2.apply_updates
    Group.reduce, Group.wait, train_gpt2.apply_updates = reduce, wait, apply_updates
    groups = train_gpt2.optimizer_groups(model, config, model.embedding.dtype, processes)
    rows = config.tokens_per_step // config.row_tokens // processes.world
    batch = train_gpt2.read_rows(stream, processes.rank * rows * config.row_tokens, rows, config.row_tokens, 10**9)
    train_gpt2.train_step(model, groups, batch, rows // 2, 0)
    Path(out, f"order_{processes.rank}.json").write_text(json.dumps(events))


def lose_shard(*arguments: str) -> None:
    """Train; in process 1 alone the shards are gone after a few reads."""
    read, calls = train_gpt2.read_tokens, []

    def vanishing(shard, start, count):
        calls.append(shard)
        return read(shard if len(calls) < 10 else shard._replace(path=shard.path + ".vanished"), start, count)

    if os.environ["RANK"] == "1":
        train_gpt2.read_tokens = vanishing
    train_gpt2.main(list(arguments))


if __name__ == "__main__":
    {"jobs": jobs, "order": order, "lose_shard": lose_shard}[sys.argv[1]](*sys.argv[2:])
    if train_gpt2.dist.is_initialized():
        train_gpt2.dist.destroy_process_group()
