"""`unihema push`: a checkpoint or adapter to the Hub."""

from pathlib import Path

import typer


def push(
    folder: Path = typer.Argument(..., help="Checkpoint or adapter folder, with its card."),
    repo_id: str = typer.Argument(..., help="Repository on the Hub, such as lab/blood-smears."),
    public: bool = typer.Option(False, "--public", help="For everybody; a new repository is private by default."),
    revision: str = typer.Option(None, help="Branch; made when missing."),
    message: str = typer.Option(None, "--message", "-m", help="Of the commit."),
    base: str = typer.Option(None, help="Repository of an adapter's base, where the adapter names a folder."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check and list the files, and send nothing."),
) -> None:
    """Upload a checkpoint or adapter to the Hub; what broke off goes on when the command is repeated.

    The token is the one of `hf auth login` or HF_TOKEN.
    """
    from unihema.hub_cards import plan_push, push_folder

    plan = plan_push(folder, repo_id, base)
    for file, size in plan.sizes.items():
        typer.echo(f"  {size:>13,}  {file}")
    for name, reason in plan.left_out.items():
        typer.echo(f"  {'stays here':>13}  {name} ({reason})")
    visibility = "public" if public else "private"
    where = f"{repo_id}{f' at {revision}' if revision else ''}"
    typer.echo(
        f"{plan.kind}, {len(plan.files)} files, {sum(plan.sizes.values()) / 1e6:.1f} MB, to {where} ({visibility})."
    )
    if dry_run:
        typer.echo("Nothing was sent.")
        return
    done = push_folder(folder, repo_id, private=not public, revision=revision, commit_message=message, base_model=base)
    typer.echo(f"{done.url} ({'private' if done.private else 'public'}), commit {done.commit[:12]}.")
