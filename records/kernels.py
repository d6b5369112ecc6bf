"""Where the time of a training step goes on the device, by kind of kernel.

    python records/kernels.py --preset gpt2 --stage 2               # on a GPU
    python records/kernels.py --preset tiny                         # on a CPU: operators in place of kernels

Options are those of train_gpt2.py, --stage N (default 2, the last before the extension) and --trace FILE (for
ui.perfetto.dev). Rows come from --train-files where these exist, else they are made up. Four steps compile; then the
profiler sees two whole periods of Adam. Times are torch.profiler's own, per step. Idle time is what lies between the
first and the last kernel and in no kernel.
"""

import argparse
import re
import sys
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import timing

import train_gpt2
from train_gpt2 import UserError

COMPILING = 4  # steps before the profiler
KINDS = (  # the first that a kernel's name matches
    ("attention", "flex|attention|flash|sdpa|softmax"), ("matrix products", "gemm|mm|cutlass|nvjet|cublas|linear|matmul|addbmm"),
    ("loss", "logsumexp|tanh|log_softmax|float8|e4m3|e5m2|gather"), ("tables", "embedding|index|scatter|sort|radix|unique"),
    ("copies and fills", "memcpy|memset|copy|fill|zero|_to_"), ("optimizer", "lerp|foreach|sqrt|rsqrt"),
    ("norms and other pointwise work", ""))


def kind_of(name):
    return next(kind for kind, pattern in KINDS if re.search(pattern, name.lower()))


def busy_time(spans):
    """Time in which at least one of the (begin, end) spans runs."""
    busy, reached = 0.0, -float("inf")
    for begin, end in sorted(spans):
        busy, reached = busy + max(0.0, end - max(begin, reached)), max(reached, end)
    return busy


def recorded(config, stage, processes):
    """The profile of two periods of Adam in one stage, and its steps. Raises UserError."""
    config, float8, compiled = train_gpt2.for_device(config, processes)
    stretch = next((part for part in timing.stretches(config) if stage in part.stages), None)
    if stretch is None:
        raise UserError(f"--stage {stage} has no step in a run of --steps {config.steps}")
    counted = 2 * config.adam_every
    steps = stretch.steps(COMPILING + counted, config.adam_every)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (processes.device.type == "cuda")]
    with tempfile.TemporaryDirectory() as folder:
        stream, rows = timing.open_rows(config, folder)
        print(f"{rows}; --preset {config.preset}, stage {stretch.name}, {processes.device.type}, {config.dtype}")
        model = train_gpt2.GPT(config, stream.vocabulary, float8, compiled).to(processes.device)
        groups = train_gpt2.optimizer_groups(model, processes)
        batches = timing.stretch_batches(stream, config, stretch.stages[0], len(steps), processes)
        with closing(batches):
            for step in steps[:COMPILING]:
                train_gpt2.train_step(model, groups, next(batches), step)
            processes.synchronize()
            with profile(activities=activities) as seen:
                for step in steps[COMPILING:]:
                    train_gpt2.train_step(model, groups, next(batches), step)
                processes.synchronize()
    return seen, counted


def summary(seen, counted):
    """Rows of (kind or kernel, ms per step, share, calls per step), and the share of idle time."""
    averages = seen.key_averages()
    on_device = any(average.self_device_time_total for average in averages)
    times = {a.key: ((a.self_device_time_total if on_device else a.self_cpu_time_total) / 1000 / counted, a.count / counted)
             for a in averages if not on_device or "CUDA" in str(a.device_type)}
    total = sum(time for time, _ in times.values()) or 1.0
    kinds = Counter()
    for name, (time, _) in times.items():
        kinds[kind_of(name)] += time
    rows = [(kind, time, time / total, sum(n for name, (_, n) in times.items() if kind_of(name) == kind))
            for kind, time in kinds.most_common()]
    costliest = sorted(times.items(), key=lambda pair: -pair[1][0])[:10]
    rows += [("  " + name[:70], time, time / total, calls) for name, (time, calls) in costliest]
    spans = [(event.time_range.start, event.time_range.end) for event in seen.events()
             if ("CUDA" in str(event.device_type)) == on_device]
    whole = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return rows, 1 - busy_time(spans) / whole if on_device else None


def main(arguments=None):
    """The command line. Returns the rows."""
    parser = train_gpt2.Parser(usage="python records/kernels.py [--stage N] [--trace FILE] [OPTIONS of train_gpt2.py]",
                               description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--stage", type=int, default=2, metavar="N")
    parser.add_argument("--trace", metavar="FILE")
    options, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    config = train_gpt2.parse_command_line(rest)
    seen, counted = recorded(config, options.stage, train_gpt2.start_processes(config))
    rows, idle = summary(seen, counted)
    print(timing.aligned([["kind, then the ten costliest", "ms/step", "share", "calls/step"], *(
        [name, f"{time:.3f}", f"{100 * share:.1f} %", f"{calls:g}"] for name, time, share, calls in rows)]))
    if idle is not None:
        print(f"idle between the first and the last kernel: {100 * idle:.1f} %")
    if options.trace:
        seen.export_chrome_trace(options.trace)
    return rows


if __name__ == "__main__":
    main()
