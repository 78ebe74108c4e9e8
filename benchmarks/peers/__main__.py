"""`python -m benchmarks.peers`: trains single-task peers and writes one table of them and UniHema."""

import json
import shlex
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
import typer

from benchmarks.measuring import processor_name
from benchmarks.peers.comparison import UNIHEMA, compare, default_config
from benchmarks.peers.peers import PEERS, size_of
from benchmarks.peers.speed import conditions, measure
from benchmarks.peers.table import best_peers, comparison, page
from unihema.files import write_json, write_text
from unihema.training.run.config import RunConfig
from unihema_cli.options import pairs, run_overrides


PEER_HELP = f"Train this peer only; may be repeated. There are {', '.join(PEERS)}."
SHIPPED = Path(str(files("unihema"))) / "shipped_files" / "checkpoint"


def main(
    data: list[Path] = typer.Option(..., "--data", help="Data folder; may be repeated."),
    minutes: float = typer.Option(..., help="Minutes of training for each peer."),
    peer: list[str] = typer.Option([], "--peer", help=PEER_HELP),
    output: Path = typer.Option(Path("runs/peers"), "--output", "-o", help="Folder for the peers and their results."),
    docs: Path = typer.Option(
        None, help="Folder for peers.md and peers.json, such as docs/results; --output by default."
    ),
    checkpoint: Path = typer.Option(
        SHIPPED, help="UniHema's checkpoint; the one that comes with the package by default."
    ),
    checkpoint_minutes: float = typer.Option(None, help="How long it was trained, all tasks together; for the table."),
    learning_rate: list[str] = typer.Option([], help="Learning rate of a peer, PEER=RATE; may be repeated."),
    rename: list[str] = typer.Option([], help="New name of a class, platelet=Platelets; may be repeated."),
    samples: int = typer.Option(None, help="Measure on about this many rows of a task, the same for all models."),
    note: str = typer.Option(
        None, help="What else a reader of the page must know, such as where finished peers come from."
    ),
    rounds: int = typer.Option(10, min=1, help="Timed rounds."),
    setting: list[str] = typer.Option([], "--set", help="Any other setting of run_config.json, NAME=JSON."),
    config: Path = typer.Option(None, help="A run_config.json to take settings from, instead of the tiny preset's."),
    resume: bool = typer.Option(False, "--resume", help="Go on with what is in --output; finished peers stay."),
) -> None:
    """Compare UniHema with single-task peers: same data, machine, minutes and sizes; a peer that is done is kept."""
    given: dict[str, Any] = {
        "output_dir": str(output),
        "data.folders": [str(folder) for folder in data],
        "data.tasks": None,
        "data.rename": pairs(rename, "--rename", "platelet=Platelets") or None,
        "optimisation.time_limit_minutes": minutes,
        "logging.final_samples": samples,
    }
    settings = default_config() if config is None else RunConfig.load(config)
    settings = settings.with_overrides(run_overrides(given, setting))
    rates = pairs(learning_rate, "--learning-rate", "unet=5e-4", float)
    results = compare(settings, checkpoint, peer, rates, resume)
    peers = [name for name in results if name != UNIHEMA]
    best = best_peers(results)
    tasks = [task for task in best if task in results[UNIHEMA]["report"]]
    had = conditions()
    speed = measure(output, peers, list(best.values()), tasks, checkpoint, rounds)
    compared = comparison(results, speed, checkpoint_minutes)
    had |= {
        "command": shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]]),
        "processor": processor_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "folders": [folder.name for folder in data],
        "minutes": minutes,
        "image_sizes": {
            compared: settings.data.image_sizes[size_of(compared)]
            for compared in best
            if size_of(compared) in settings.data.image_sizes
        },
        "start": settings.model.backbone_weights,
        "seed": settings.optimisation.seed,
        "device": results[peers[0]]["trained"]["device"],
        "note": note,
    }
    docs = output if docs is None else docs
    write_json(docs / "peers.json", {"conditions": had, **compared})
    written = json.loads((docs / "peers.json").read_text(encoding="utf-8"))
    write_text(docs / "peers.md", page(written, written["conditions"]))
    typer.echo(f"{docs / 'peers.md'}")


if __name__ == "__main__":
    typer.run(main)
