"""Where the time of a training step goes on the device, kernel by kernel.

    python records/kernels.py --preset gpt2 --stage last            # on a GPU: its ten costliest kernels
    python records/kernels.py --preset tiny                         # on a CPU: operators in place of kernels

Options are those of train_gpt2.py, --stage N|last (default last, the last one before the extension) and --trace FILE
(default logs/kernels.json.gz, for chrome://tracing or ui.perfetto.dev). Rows come from --train-files where these exist,
else they are made up. Four steps compile, then the profiler sees twice as many as Adam needs for one
update, and the second half of these counts: by then the host has run ahead of the device, as in training.

Figures are per step, of what was launched in those. The span lasts from the begin of the first kernel to the end of the
last one; a share is a kernel's time over the span. Idle is the part without kernel, copy or fill on any stream.
On a CPU, operators count without those that they call. Host waits are calls that stop the host until the device is
done; a copy of a number to the host (`item`) is one of them.
"""

import gzip
import json
import sys
import tempfile
import types
from collections import Counter, defaultdict
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import timing

import train_gpt2
from train_gpt2 import Config, Processes, Refusal

DEFAULT_TRACE = "logs/kernels.json.gz"
COMPILING, COUNTED = 4, "steps that count"  # steps before the profiler; the mark in the trace of those that count
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "aten::item")


def own_times(events: list[dict]) -> list[tuple[str, float]]:
    """The name of each event of a trace, and its microseconds without those of events within it on its thread."""
    open_ones, found = defaultdict(list), []  # of each thread, the innermost last: [name, own time, end]
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        around = open_ones[event["pid"], event["tid"]]
        while around and around[-1][2] <= event["ts"]:
            around.pop()
        if around:
            around[-1][1] -= event["dur"]
        around.append([event["name"], event["dur"], event["ts"] + event["dur"]])
        found.append(around[-1])
    return [(name, max(0.0, own)) for name, own, _ in found]


def busy_time(events: list[dict]) -> float:
    """Microseconds in which at least one of the events runs."""
    busy, end = 0.0, -float("inf")
    for begin, until in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        busy, end = busy + max(0.0, until - max(begin, end)), max(end, until)
    return busy


def summary(trace: dict, steps: int) -> dict:
    """The figures of a Chrome trace in which so many steps count."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    mark = next(event for event in events if event["name"] == COUNTED and event["cat"] == "user_annotation")
    launches = {event["args"]["correlation"]: event["ts"] for event in events
                if event["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]}
    events = [event for event in events if  # kernels by when they were launched
              0 <= launches.get(event.get("args", {}).get("correlation"), event["ts"]) - mark["ts"] < mark["dur"]]
    run = ([event for event in events if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
           or [event for event in events if event["cat"] == "cpu_op"])
    kind = "operator" if run[0]["cat"] == "cpu_op" else "kernel"
    span = max(event["ts"] + event["dur"] for event in run) - min(event["ts"] for event in run)
    times, calls, waits = Counter(), Counter(), Counter(e["name"] for e in events if e["name"] in WAITS)
    for name, own in own_times(run):
        times[name] += own
        calls[name] += 1
    return {"kind": kind, "ms": span / 1000 / steps, "idle share": 1 - busy_time(run) / span,
            "calls": len(run) / steps, "names": len(times), "host waits": {n: waits[n] / steps for n in sorted(waits)},
            "costliest": [{"name": name, "ms": time / 1000 / steps, "share": time / span, "calls": calls[name] / steps}
                          for name, time in times.most_common(10)]}


def text_of(figures: dict) -> str:
    rows, costliest = [[f"costliest {figures['kind']}s", "ms/step", "share", "calls/step"]], figures["costliest"]
    rows += [[k["name"][:76], f"{k['ms']:.3f}", f"{100 * k['share']:.1f} %", f"{k['calls']:g}"] for k in costliest]
    waits = ", ".join(f"{name} {count:g}" for name, count in figures["host waits"].items()) or "none"
    return (f"{timing.aligned(rows)}\nhost waits per step: {waits}\nstep {figures['ms']:.2f} ms, idle "
            f"{100 * figures['idle share']:.1f} %, {figures['calls']:g} {figures['kind']}s of {figures['names']} names")


def recorded(config: Config, stage: int, path: str, processes: Processes) -> int:
    """Run the steps, write the trace, and return how many count. Raises Refusal."""
    device, period, stretches = processes.device, config.adam_every, timing.stretches(config)
    dtype = train_gpt2.compute_dtype(config, device)
    part = next((part for part in stretches if stage in part.stages), None)
    if part is None:
        raise Refusal(f"stage {stage} has no step in this run of --steps {config.steps} and --stages {config.stages}; "
                      f"the nearest is --stage {stretches[-1].stages[-1]}")
    steps = part.steps(COMPILING + 2 * period, period)
    with tempfile.TemporaryDirectory() as folder:
        stream, rows = timing.open_rows(config, folder)
        print(f"{rows}; {timing.device_name(device)}, {str(dtype)[6:]}; --preset {config.preset}, stage {part.name}")
        model = train_gpt2.GPT(config, stream.vocabulary, dtype).to(device)
        model.float8 = train_gpt2.float8_head(config, dtype, device)
        groups = train_gpt2.optimizer_groups(model, config, dtype, processes)
        if train_gpt2.can_compile(config, processes, dtype, types.SimpleNamespace(line=print)):
            model.compile_parts()
            for group in groups.values():
                group.compile_update()
        batches = timing.stretch_batches(stream, config, part.stages[0], len(steps), processes)

        def run(some: list[int]) -> None:
            for step in some:
                train_gpt2.train_step(model, groups, next(batches), step)

        run(steps[:COMPILING])
        processes.synchronize()
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]) as seen:
            run(steps[COMPILING:-period])
            with record_function(COUNTED):
                run(steps[-period:])
            processes.synchronize()
        batches.close()
    seen.export_chrome_trace(path)
    return period


def main(arguments: list[str] | None = None) -> dict:
    """The command line. Returns the figures."""
    stage, words = timing.take_option(sys.argv[1:] if arguments is None else arguments, "--stage", "last")
    path, words = timing.take_option(words, "--trace", DEFAULT_TRACE)
    if stage != "last" and not stage.isdecimal():
        raise Refusal(f"--stage {stage} is neither a number nor last; the nearest is --stage last")
    if {"-h", "--help"} & {*words}:
        print(__doc__)
    config = train_gpt2.parse_command_line(words)
    try:
        if path == DEFAULT_TRACE:
            Path(path).parent.mkdir(exist_ok=True)
        open(path, "ab").close()
    except OSError as error:
        raise Refusal(f"cannot write {path}: {error.strerror}; name a writable place with --trace FILE") from None
    stage = config.stages - 1 if stage == "last" else int(stage)
    steps = recorded(config, stage, path, train_gpt2.start_processes(config))
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        figures = summary(json.load(file), steps)
    print(f"{text_of(figures)}\ntrace in {path}")
    return figures


if __name__ == "__main__":
    main()
