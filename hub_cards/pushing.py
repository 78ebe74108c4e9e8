"""A checkpoint or adapter to the Hub: one commit, private unless asked otherwise, gone on with when repeated."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from unihema.errors import CardError, PushError

from .files_to_push import Plan, plan_push
from .folder_card import CARD_FILE
from .hub_calls import call_hub


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from unihema.processing_unihema.processing_unihema import UniHemaProcessor


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Args:
        url (`str`): Address of the repository.
        commit (`str`): The commit; the last one where nothing had changed.
        private (`bool`): Whether only the owner and those let in can see it.
        plan ([`Plan`]): The files.
    """

    url: str
    commit: str
    private: bool
    plan: Plan


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    token: str | None = None,
) -> PushResult:
    """Uploads a checkpoint or adapter as one commit.

    A repository that is not there is made. Weights of an earlier push under other names are taken away in the same
    commit, so that they are not loaded instead. Repeating a push that broke off sends only what had not arrived.

    Args:
        folder (`str` or `Path`): A checkpoint, or a PEFT adapter, with its card.
        repo_id (`str`): Where to, such as `lab/blood-smears`.
        private (`bool`): Whether only the owner and those let in may see it.
        revision (`str`, *optional*): Branch; made when missing. `main` by default.
        commit_message (`str`, *optional*): The commit's; `Upload checkpoint` or `Upload adapter` by default.
        base_model (`str`, *optional*): Id of an adapter's base, where `adapter_config.json` names a folder.
        token (`str`, *optional*): Of the Hub; what `hf auth login` or HF_TOKEN left when missing.

    Returns:
        [`PushResult`]

    Raises:
        CheckpointError: The folder is not whole, holds pickled weights, or is neither.
        CardError: No card, or one that may not be published, here or in the Hub's view.
        PushError: The Hub refused, or the connection broke off.
    """
    plan = plan_push(folder, repo_id, base_model)
    api = HfApi(token=token)
    if plan.base_model is not None:
        call_hub(lambda: api.repo_info(plan.base_model), f"{plan.base_model} (the adapter's base)", token)
    call_hub(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id, token)
    # An existing repository keeps its visibility whatever is asked for.
    is_private = bool(call_hub(lambda: api.repo_info(repo_id), repo_id, token).private)
    if private and not is_private:
        raise PushError(
            f"{repo_id}: is public already, and everybody would see the push. Make it private on the Hub, or push with "
            "--public (private=False)."
        )
    if revision is not None and not revision.startswith("refs/"):
        call_hub(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id, token)
    message = commit_message or f"Upload {plan.kind}"

    def commit() -> Any:
        # Anew on every try: what has arrived meanwhile is asked for again.
        head = api.repo_info(repo_id, revision=revision)
        operations = [*_additions(plan), *_deletions(plan, [file.rfilename for file in head.siblings or ()])]
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=head.sha)

    try:
        done = call_hub(commit, repo_id, token)
    except ValueError as error:
        if CARD_FILE not in str(error):
            raise PushError(f"{repo_id}: {error}") from error
        # The Hub reads the card's metadata before anything is uploaded.
        raise CardError(f"{Path(folder) / CARD_FILE}: {error}") from error
    return PushResult(f"{api.endpoint}/{repo_id}", done.oid, is_private, plan)


def push_to_hub(
    model: "PreTrainedModel | Any",
    repo_id: str,
    *,
    card: str,
    processor: "UniHemaProcessor | None" = None,
    max_shard_size: str = "5GB",
    **options: Any,
) -> PushResult:
    """Uploads a model with its processor, or an adapter, from memory.

    Unlike `model.push_to_hub` of Transformers and PEFT it is private unless asked otherwise, and takes no card with
    fields to be filled in later.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model or adapter.
        repo_id (`str`): Where to.
        card (`str`): Text of the card, by `checkpoint_card` or `adapter_card`.
        processor (`UniHemaProcessor`, *optional*): Its processor; a model needs it, an adapter may have one.
        max_shard_size (`str`): Largest weight file of a model.
        **options: See [`push_folder`].

    Returns:
        [`PushResult`]

    Raises:
        CheckpointError: A model without processor.
        CardError: A card that may not be published.
        PushError: The Hub refused, or the connection broke off.
    """
    with tempfile.TemporaryDirectory() as folder:
        sizes = {} if hasattr(model, "peft_config") else {"max_shard_size": max_shard_size}
        model.save_pretrained(folder, **sizes)
        if processor is not None:
            processor.save_pretrained(folder)
        (Path(folder) / CARD_FILE).write_text(card, encoding="utf-8")
        return push_folder(folder, repo_id, **options)


def _additions(plan: Plan) -> list[CommitOperationAdd]:
    return [
        CommitOperationAdd(upload.name, upload.content if isinstance(upload.content, bytes) else str(upload.content))
        for upload in plan.uploads
    ]


def _deletions(plan: Plan, there: list[str]) -> list[CommitOperationDelete]:
    """Weights of an earlier push that loading would prefer to those of this one."""
    kept = {upload.name for upload in plan.uploads}
    stems = ("model", "pytorch_model", "adapter_model")
    weights = [name for name in there if "/" not in name and name.startswith(stems) and name not in kept]
    endings = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    return [CommitOperationDelete(name) for name in weights if name.endswith(endings)]


__all__ = ["PushResult", "push_folder", "push_to_hub"]
