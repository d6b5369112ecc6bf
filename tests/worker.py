"""What test_processes.py starts in several processes: torchrun ... worker.py TASK. Its jobs come in a file."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # before there is a process group: modules of it that come later hold that group, and a thread of
                      # the group that lives on and drops a tensor while the interpreter ends aborts the process

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
        config, validated[name] = model.config, {}
        for rows in job["micro"]:
            model.config = dataclasses.replace(config, micro_tokens=rows * config.val_row_tokens)
            validated[name][rows] = train_gpt2.validate(model, stream, config.val_tokens, saved["step"], processes)
    if processes.rank == 0:
        Path(path).with_name("validated.json").write_text(json.dumps(validated))


def prepared(arguments: tuple[str, ...]):
    """Model, groups, processes, and this process's batch of each step."""
    config = train_gpt2.parse_command_line(list(arguments))
    processes = train_gpt2.start_processes(config)
    stream = train_gpt2.TokenStream(config.train_files)
    dtype = train_gpt2.compute_dtype(config, processes.device)
    model = train_gpt2.GPT(config, stream.vocabulary, dtype)
    batches = list(train_gpt2.step_batches(stream, config, processes))
    return model, lambda: train_gpt2.optimizer_groups(model, config, dtype, processes), processes, batches


def order(out: str, steps: str, *arguments: str) -> None:
    """These steps of a run, in micro-batches. Each process writes what happened in which order during each of them, as
    OUT/order_RANK.json."""
    model, groups_of, processes, batches = prepared(arguments)
    events = []
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
    groups, happened = groups_of(), {}
    for step in map(int, steps.split(",")):
        events.clear()
        train_gpt2.train_step(model, groups, batches[step], step)
        happened[step] = list(events)
    Path(out, f"order_{processes.rank}.json").write_text(json.dumps(happened))


def warm(out: str, *arguments: str) -> None:
    """Warm up after two steps, then take one more. Each process writes what it did when, and whether all its numbers
    were put back, as OUT/warm_RANK.json. The first process is slow, so that the other would overtake it if it could."""
    model, groups_of, processes, batches = prepared(arguments)
    groups, events = groups_of(), []
    for step in range(2):
        train_gpt2.train_step(model, groups, batches[step], step)

    def noted(kind: str, call):
        def with_times(*anything, **settings):
            begin = time.monotonic()
            result = call(*anything, **settings)
            if kind == "step" and processes.rank == 0:
                time.sleep(0.1)
            events.append([kind, begin, time.monotonic()])
            return result
        return with_times

    for module, name in ((train_gpt2, "reduce_scatter"), (train_gpt2, "all_gather"), (train_gpt2.dist, "all_reduce"),
                         (train_gpt2.dist, "broadcast")):
        setattr(module, name, noted("exchange", getattr(module, name)))
    train_gpt2.train_step = noted("step", train_gpt2.train_step)
    numbers = [tensor for group in groups.values() for tensor in (group.weights, group.gradients, *group.state)]
    before = [tensor.clone() for tensor in numbers]
    train_gpt2.warm_up(model, groups, processes, lambda step: batches[step], lambda step: None)
    torch.compiler.set_stance("default")
    restored = all(map(torch.equal, numbers, before))
    events.append(["warm", 0, time.monotonic()])
    train_gpt2.train_step(model, groups, batches[2], 2)
    Path(out, f"warm_{processes.rank}.json").write_text(json.dumps({"events": events, "restored": restored}))


def lose_shard(*arguments: str) -> None:
    """Train; in process 1 alone the shards are gone after a few reads."""
    read, calls = train_gpt2.read_tokens, []

    def vanishing(shard, start, count):
        calls.append(shard)
        return read(shard if len(calls) < 25 else shard._replace(path=shard.path + ".vanished"), start, count)

    if os.environ["RANK"] == "1":
        train_gpt2.read_tokens = vanishing
    train_gpt2.main(list(arguments))


if __name__ == "__main__":
    {"jobs": jobs, "order": order, "warm": warm, "lose_shard": lose_shard}[sys.argv[1]](*sys.argv[2:])
    if train_gpt2.dist.is_initialized():
        train_gpt2.dist.destroy_process_group()
