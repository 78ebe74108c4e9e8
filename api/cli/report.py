"""The command `report`: the differential of a sample, as a page to print."""

from pathlib import Path

import click

from .options import PATH, output_option
from .review import sample_by_option


@click.command()
@click.argument("results", type=PATH)
@output_option()
@sample_by_option
@click.option("--target", type=click.IntRange(1), metavar="CELLS", help="White cells to count; 100 by default.")
@click.option("--white-count", type=float, metavar="10^9/L", help="White count of another instrument.")
@click.option("--red-count", type=float, metavar="10^12/L", help="Red count of another instrument.")
@click.option("--smudge-as-lymphocytes", is_flag=True, help="Count smudge cells as lymphocytes.")
@click.option("--thick-film", is_flag=True, help="Count parasites beside white cells.")
@click.option(
    "--assume-white-count", is_flag=True, help="Of a thick film take the white count of the table, 8 x 10^9/L."
)
@click.option("--tables", type=PATH, metavar="FILE", help="Orders, grades and numbers of your laboratory, in JSON.")
@click.option("--monolayer-bands", type=PATH, metavar="FILE", help="Bands by which the monolayer is judged, in JSON.")
@click.option(
    "--leave-out", type=click.Choice(("unlike", "quality")), multiple=True,
    help="Images not to count: unlike those of the training, or of poor quality; may be repeated.",
)  # fmt: skip
@click.option("--keep-types", is_flag=True, help="Count white cells by their types however uncertain these are.")
@click.option("--checkpoint", type=PATH, help="Checkpoint of the results, for its own errors; where it was by default.")
@click.option("--least-certain", type=click.IntRange(1), metavar="CELLS", help="Also list the cells to look at next.")
def report(
    results: Path,
    output: Path | None,
    sample_by: str | None,
    target: int | None,
    white_count: float | None,
    red_count: float | None,
    smudge_as_lymphocytes: bool,
    thick_film: bool,
    assume_white_count: bool,
    tables: Path | None,
    monolayer_bands: Path | None,
    leave_out: tuple[str, ...],
    keep_types: bool,
    checkpoint: Path | None,
    least_certain: int | None,
) -> None:
    """Report samples: differential, red cells, parasites, platelets.

    RESULTS is a folder that `unihema predict` wrote. What `unihema review` corrected and signed in it counts. Writes for each
    sample a page, JSON, a table, and FHIR; into RESULTS/report where no folder is named.
    """
    from unihema.files import printable
    from unihema.report.page import whole_percent
    from unihema.report.report_files import write_reports
    from unihema.report.sample import ReportOptions
    from unihema.report.smear_report import SmearReport
    from unihema.report.tables import ReportTables
    from unihema.results.calibration import certainty
    from unihema.review.reviewed_results import reviewed_samples

    options = ReportOptions(target, white_count, red_count, smudge_as_lymphocytes, thick_film, assume_white_count)
    samples = reviewed_samples(results, sample_by, checkpoint)
    if len(samples) > 1 and (white_count is not None or red_count is not None):
        raise click.UsageError(
            f"--white-count and --red-count are of one sample, and here are {len(samples)}. Put the images of one sample into "
            "results of their own."
        )
    told = {
        "tables": ReportTables.read(tables),
        "options": options,
        "monolayer_bands": monolayer_bands,
        "leave_out": leave_out,
        "keep_types": keep_types,
    }
    reports = [SmearReport.of(sample.results, sample.name, **told, **sample.details) for sample in samples]
    pages = write_reports(reports, output or results / "report")
    for each, page in zip(reports, pages, strict=True):
        white = each.figures["white_cells"]
        shares = ", ".join(f"{row['name']} {whole_percent(row['percent'])} %" for row in white["rows"] if row["count"])
        click.echo(printable(f"{each.sample}: {white['total']} white cells{': ' if shares else ''}{shares}"))
        click.echo(printable(f"  {page}"))
        if least_certain is not None:
            for number, (image, cell) in enumerate(each.doubtful()):
                if number == least_certain:
                    break
                click.echo(printable(f"  {image.name}, cell {cell.id}: {cell.label} ({certainty(cell):.2f})"))
