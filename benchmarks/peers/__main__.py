"""`python -m benchmarks.peers`: trains single-task peers and writes one table of them and UniHema."""

import json
import shlex
import sys
from importlib.resources import files
from pathlib import Path

import click
import torch
import transformers

from benchmarks.measuring import processor_name
from benchmarks.peers.comparison import UNIHEMA, compare, default_config
from benchmarks.peers.peers import PEERS, size_of
from benchmarks.peers.speed import conditions, measure
from benchmarks.peers.table import best_peers, comparison, page
from unihema.files import write_json, write_text
from unihema.training.run.config import RunConfig
from unihema_cli.options import PATH, NameValue, set_option, settings_of


SHIPPED = Path(str(files("unihema"))) / "shipped_files" / "checkpoint"


@click.command()
@click.option("--data", multiple=True, required=True, type=PATH, help="Data folder; may be repeated.")
@click.option("--abroad", multiple=True, type=PATH, help="Data folder that nothing is trained on; may be repeated.")
@click.option("--minutes", required=True, type=float, help="Minutes of training for each peer.")
@click.option("--peer", "names", multiple=True, type=click.Choice(list(PEERS)), help="This one only; may be repeated.")
@click.option("--output", "-o", type=PATH, default="runs/peers", help="Folder for the peers and their results.")
@click.option("--docs", type=PATH, help="Folder for peers.md and peers.json, such as docs/results; OUTPUT by default.")
@click.option("--checkpoint", type=PATH, default=SHIPPED, help="UniHema's checkpoint; that of the package by default.")
@click.option("--checkpoint-minutes", type=float, help="How long it was trained, all tasks together; for the table.")
@click.option(
    "--learning-rate",
    "rates",
    multiple=True,
    type=NameValue("unet=5e-4"),
    help="Of a peer, PEER=RATE; may be repeated.",
)
@click.option("--samples", type=int, help="Measure on about this many rows of a task, the same for all models.")
@click.option("--note", help="What else a reader of the page must know, such as where finished peers come from.")
@click.option("--rounds", type=click.IntRange(1), default=10, help="Timed rounds.")
@click.option("--config", type=PATH, help="A run_config.json to take settings from, instead of the tiny preset's.")
@set_option
def main(
    data: tuple[Path, ...],
    abroad: tuple[Path, ...],
    minutes: float,
    names: tuple[str, ...],
    output: Path,
    docs: Path | None,
    checkpoint: Path,
    checkpoint_minutes: float | None,
    rates: tuple[tuple[str, str], ...],
    samples: int | None,
    note: str | None,
    rounds: int,
    config: Path | None,
    more_settings: tuple[tuple[str, str], ...],
) -> None:
    """Compare UniHema with single-task peers: same data, machine, minutes and sizes.

    A peer that is done is kept; the same command goes on where it was stopped.
    """
    settings = default_config() if config is None else RunConfig.load(config)
    settings = settings.with_overrides(
        {
            "output_dir": str(output),
            "data.folders": [str(folder) for folder in data],
            "data.tasks": None,
            "optimisation.time_limit_minutes": minutes,
            "logging.final_samples": samples,
            **settings_of(more_settings),
        }
    )
    own_rates = {name: float(rate) for name, rate in rates}
    results = compare(settings, checkpoint, names, own_rates, resume=True, abroad=abroad)
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
    click.echo(f"{docs / 'peers.md'}")


if __name__ == "__main__":
    main()
