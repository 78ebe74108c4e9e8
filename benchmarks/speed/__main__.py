"""`python -m benchmarks.speed`: measures, section by section, and writes a page, a plot and JSON."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import click
import torch
import transformers

from benchmarks.measuring import gemm_rate, processor_name
from benchmarks.speed import attention, data, detection, gpu, tasks, throughput, training_step
from benchmarks.speed.report import growth_plot, page
from unihema.files import write_text
from unihema.training.studies.study import save_plot


SIZES = [(512, 512), (800, 1066)]
GPU = "gpu"


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path), default="docs/results", help="Folder for speed.md and others."
)
@click.option("--rounds", type=int, default=3, help="Timed rounds of each case.")
@click.option(
    "--compiled/--no-compiled", default=True, help="Also measure detection with torch.compile, which takes minutes."
)
@click.option("--section", multiple=True, help="Measure only these again; the others stay as they are in the JSON.")
def bench(output: Path, rounds: int, compiled: bool, section: tuple[str, ...]) -> None:
    """Measure UniHema beside its peers; a section that is done is written at once. The section gpu needs a CUDA device."""
    record = output / "speed.json"
    results = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if not section or GPU in section:
        _measure_gpu(record, results)
    if section == (GPU,) and "machine" in results:
        write_text(output / "speed.md", [page(results, detection.exponents(results.get("growth", [])))])
        click.echo(f"{output / 'speed.md'}")
        return
    rate = gemm_rate()
    machine = {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gflops": rate / 1e9,
    }
    if not section or "machine" not in results:
        results["machine"], results["again"] = machine, {}
    sections: dict[str, Callable[[], list[dict]]] = {
        "data": lambda: data.measure(rounds),
        "loss": lambda: training_step.loss(rounds),
        "tasks": lambda: tasks.measure(SIZES[0], rounds),
        "throughput": lambda: throughput.measure(24, rounds),
        "memory": lambda: detection.memory(SIZES[1]),
        "growth": lambda: detection.growth(rounds),
        "step": lambda: training_step.step(rounds),
        "attention": lambda: attention.measure(SIZES, rounds),
        "detection": lambda: detection.measure(SIZES, rounds, compiled, rate),
    }
    for name, measure in sections.items():
        if not section or name in section:
            if section:
                # What ran beside it shows in the load.
                results.setdefault("again", {})[name] = machine | {"load": os.getloadavg()[0]}
            results[name] = measure()
            write_text(record, [json.dumps(results, indent=1), "\n"])
    exponents = detection.exponents(results.get("growth", []))
    if exponents:
        save_plot(output / "growth.png", growth_plot(results["growth"]))
    write_text(output / "speed.md", [page(results, exponents)])
    click.echo(f"{output / 'speed.md'}")


def _measure_gpu(record: Path, results: dict) -> None:
    """Measures the section on the first GPU, and writes it row by row; without one the section stays as it is."""
    if not torch.cuda.is_available():
        click.echo("No CUDA device: the section gpu is not measured.")
        return
    results[GPU], results["gpu machine"] = [], gpu.machine(torch.device("cuda"))
    for row in gpu.measure("cuda"):
        click.echo(f"{row['case']}: {row['ours']} {row['unit']}" + (f", peer {row['peer']}" if row["peer"] else ""))
        results[GPU].append(row)
        write_text(record, [json.dumps(results, indent=1), "\n"])


if __name__ == "__main__":
    bench()
