"""A checkpoint or adapter to the Hub: what loading needs and its card, private unless asked otherwise, and nothing else."""

import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from unihema.checkpoint_files import ADAPTER_CONFIG, REFERENCE_FILE, adapter_files, checkpoint_files, read_json
from unihema.errors import CardError, CheckpointError, InputError, PushError
from unihema.files import scratch_folder, shortened
from unihema.hub import bounded_hub, hidden, seconds_to_wait
from unihema.modeling_unihema.remote_code import code_files

from .card import CARD_FILE, for_repo, stale_result
from .check import check_card, is_repo_id


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from unihema.processing_unihema.processing_unihema import UniHemaProcessor

# Loaded by unpickling, which runs whatever code whoever wrote the file put there.
PICKLED = {".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle"}
# What goes where it is there, beside the files that loading cannot do without.
OPTIONAL = (
    *("generation_config.json", "preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "spiece.model", "chat_template.jinja", REFERENCE_FILE),
    *("metrics.json", "metrics.md", "before_after.json", "before_after.md", "run_config.json", "data.json"),
    *("conversion.tsv", "LICENSE", "LICENSE.md", "NOTICE"),
)
_LEFT_OUT = {
    "checkpoints": "training checkpoints with optimizer state",
    "best": "weights of an evaluation during training",
    "log.jsonl": "log of the training",
}
# What the checkpoint's own code imports, where an endpoint has only Transformers.
_REQUIREMENTS = ("transformers>=5.15,<6,!=5.24.*\n", "torch>=2.8\n", "torchvision\n", "timm\n", "scipy\n", "pillow\n")
# What a repository holds by which file, beside which the other kind cannot be loaded.
_OTHER_KIND = {"adapter": ("a checkpoint", "config.json"), "checkpoint": ("an adapter", ADAPTER_CONFIG)}
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model)[^/]*\.(safetensors|bin)(\.index\.json)?")
# huggingface_hub itself tries these again, and every PUT.
_RETRIED = ("/preupload/", "/info/lfs/")
_PASSING = (429, 500, 502, 503, 504)
_TRIES = 5
# How huggingface_hub begins an error about the card's metadata, which the Hub reads before anything is uploaded.
_CARD_REFUSED, _FIRST = "Invalid metadata in README.md", 200
_AGAIN = "repeat the command: files that arrived are not sent again."
_REMEDIES = {
    401: "there is no valid token. Log in with `hf auth login`, or set HF_TOKEN.",
    403: "the token may not write there. It needs write permission for this repository, and you a place in its "
    "organisation.",
    404: "there is no such repository or revision, or the token may not see it. Check the name.",
    409: f"somebody else is writing to it. Wait, and {_AGAIN}",
    412: f"somebody else has written to it meanwhile. {_AGAIN.capitalize()}",
    429: f"the Hub has had too many requests from here. Wait some minutes, and {_AGAIN}",
}
Result = TypeVar("Result")


@dataclass(frozen=True)
class PushPlan:
    """What a push uploads.

    Args:
        kind (`"checkpoint"` or `"adapter"`): What the folder is.
        files (`Mapping[str, Path | bytes]`): Path in the repository -> the file, or what is uploaded instead of it.
        left_out (`Mapping[str, str]`): What stays here, and why.
        base_model (`str`, *optional*): Id of an adapter's base.
    """

    kind: str
    files: Mapping[str, Path | bytes]
    left_out: Mapping[str, str]
    base_model: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in self.files.items()}


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Args:
        url (`str`): Address of the repository.
        commit (`str`): The commit; the last one where nothing had changed.
        private (`bool`): Whether only the owner and those let in can see it.
        plan ([`PushPlan`]): The files.
    """

    url: str
    commit: str
    private: bool
    plan: PushPlan


def plan_push(
    folder: str | Path, repo_id: str | None = None, base_model: str | None = None, endpoint: bool = False
) -> PushPlan:
    """Chooses and checks the files of a push; touches no network.

    Args:
        folder (`str` or `Path`): A checkpoint, or a PEFT adapter.
        repo_id (`str`, *optional*): Where it goes; the code in the card names it. Without one it stays as it is.
        base_model (`str`, *optional*): Id of an adapter's base, where `adapter_config.json` names a folder.
        endpoint (`bool`): With what an Inference Endpoint of the Hub runs: `handler.py` ([`EndpointHandler`]) and
            `requirements.txt`. Of a checkpoint only.

    Returns:
        [`PushPlan`]

    Raises:
        CheckpointError: The folder is neither, a file is missing or damaged, weights are pickled, or a file holds a token.
        CardError: No card, or one that may not be published.
        ValueError: `repo_id` is none.
    """
    folder = Path(folder)
    if repo_id is not None and not is_repo_id(repo_id):
        raise InputError(f"{repo_id!r} is no repository id; it looks like lab/blood-smears.")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Name a checkpoint or an adapter.")
    found = sorted(folder.iterdir())
    for path in found:
        if path.is_file() and path.suffix in PICKLED:
            raise CheckpointError(
                f"{path}: pickled files are not pushed, for loading them runs code. Save the model with save_pretrained, "
                "which writes safetensors, and move this file elsewhere."
            )
    base = noted = None
    if (folder / ADAPTER_CONFIG).is_file():
        kind, needed = "adapter", adapter_files(folder)
        config = read_json(folder / ADAPTER_CONFIG)
        noted = config.get("base_model_name_or_path")
        base = base_model or (None if Path(noted or "").is_dir() else noted)
        if not is_repo_id(base):
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG}: the adapter's base is {base or noted!r}, a folder that nobody else has. Push "
                "the base first and give its repository: --base lab/base."
            )
    else:
        kind, needed = "checkpoint", [*checkpoint_files(folder), *code_files(folder).values()]
    _check_whole(needed)
    if base is not None and base == repo_id:
        raise CheckpointError(
            f"{repo_id}: the adapter's base is there, and would be replaced by the adapter. Push to a repository of its own."
        )
    optional = [folder / name for name in OPTIONAL if (folder / name).is_file()]
    files: dict[str, Path | bytes] = {path.name: path for path in [*needed, *optional]}
    if base != noted:
        files[ADAPTER_CONFIG] = json.dumps({**config, "base_model_name_or_path": base}, indent=2).encode() + b"\n"
    if endpoint:
        if kind != "checkpoint":
            raise CheckpointError(f"{folder}: an adapter is no endpoint. Push a checkpoint, such as its merged base.")
        handler = resources.files("unihema.hub_cards") / "endpoint.py"
        files |= {"handler.py": handler.read_bytes(), "requirements.txt": "".join(_REQUIREMENTS).encode()}
    files[CARD_FILE] = _card(folder, repo_id, base).encode("utf-8")
    for name, content in files.items():
        if name.endswith(".safetensors"):
            continue
        if _TOKEN.search(content if isinstance(content, bytes) else content.read_bytes()):
            raise CheckpointError(f"{folder / name}: holds what looks like a token of the Hub. Take it out.")
    not_part = f"not part of {'a checkpoint' if base is None else 'an adapter'}"
    left_out = {
        path.name: _LEFT_OUT.get(path.name, not_part)
        for path in found
        if path.name not in files and not path.name.startswith(".") and path.name != "__pycache__"
    }
    return PushPlan(kind, files, left_out, base)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    token: str | None = None,
    endpoint: bool = False,
) -> PushResult:
    """Uploads a checkpoint or adapter.

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
        endpoint (`bool`): See [`plan_push`].

    Returns:
        [`PushResult`]

    Raises:
        CheckpointError: The folder is not whole, holds pickled weights, or is neither.
        CardError: No card, or one that may not be published, here or in the Hub's view.
        PushError: The Hub refused, or the connection broke off; or the repository holds an adapter where this is a checkpoint, or
            the other way round.
    """
    plan = plan_push(folder, repo_id, base_model, endpoint)
    api = HfApi(token=token)
    if plan.base_model is not None:
        _call(lambda: api.repo_info(plan.base_model), f"{plan.base_model} (the adapter's base)", token)
    _call(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id, token)
    # An existing repository keeps its visibility whatever is asked for.
    is_private = bool(_call(lambda: api.repo_info(repo_id), repo_id, token).private)
    if private and not is_private:
        raise PushError(
            f"{repo_id}: is public already, and everybody would see the push. Make it private on the Hub, or push with "
            "--public (private=False)."
        )
    if revision is not None and not revision.startswith("refs/"):
        _call(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id, token)
    head = _call(lambda: api.repo_info(repo_id, revision=revision), repo_id, token)
    other, name = _OTHER_KIND[plan.kind]
    if any(file.rfilename == name for file in head.siblings or ()):
        raise PushError(
            f"{repo_id}: holds {other} ({name}), and with this {plan.kind} beside it neither could be loaded. Push to a "
            "repository of its own."
        )

    def upload() -> CommitInfo:
        # Anew on every try: what has arrived meanwhile is asked for again.
        head = api.repo_info(repo_id, revision=revision)
        there = [file.rfilename for file in head.siblings or ()]
        earlier = [name for name in there if _WEIGHTS.fullmatch(name) and name not in plan.files]
        return api.create_commit(
            repo_id=repo_id,
            # The listed files alone: nothing else can go up, whatever lies beside them.
            operations=[
                *(CommitOperationDelete(name) for name in earlier),
                *(CommitOperationAdd(name, content) for name, content in plan.files.items()),
            ],
            commit_message=commit_message or f"Upload {plan.kind}",
            revision=revision,
            parent_commit=head.sha,
        )

    done = _call(upload, repo_id, token)
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
    with scratch_folder() as folder:
        model.save_pretrained(folder, **({} if hasattr(model, "peft_config") else {"max_shard_size": max_shard_size}))
        if processor is not None:
            processor.save_pretrained(folder)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        return push_folder(folder, repo_id, **options)


def _check_whole(files: list[Path]) -> None:
    from safetensors import SafetensorError, safe_open

    for path in files:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "np"):
                    pass
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: damaged weights ({shortened(error)}). Copy or save them again."
                ) from error


def _card(folder: Path, repo_id: str | None, base_model: str | None) -> str:
    path = folder / CARD_FILE
    if not path.is_file():
        raise CardError(f"{folder}: no {CARD_FILE}. Write the card with `unihema card {folder} --license LICENCE`.")
    text = path.read_text(encoding="utf-8")
    data = check_card(text, source=str(path)).data
    if base_model not in (None, data.base_model):
        raise CardError(f"{path}: `base_model` is {data.base_model!r}, but the adapter belongs to {base_model!r}.")
    metrics = folder / "metrics.json"
    stale = stale_result(data.eval_results, read_json(metrics) if metrics.is_file() else None)
    if stale:
        raise CardError(f"{path}: {stale}. Write the card anew with `unihema card`.")
    return text if repo_id is None else for_repo(text, repo_id)


def _call(call: Callable[[], Result], repo_id: str, token: str | None) -> Result:
    """Calls the Hub, which must be harmless to do twice: where it is busy or the connection is cut, up to five times."""
    wait, secret = 1.0, token or get_token()
    for tries_left in reversed(range(_TRIES)):
        try:
            with bounded_hub(), _own_errors():
                return call()
        except OfflineModeIsEnabled:
            raise PushError(f"{repo_id}: HF_HUB_OFFLINE is set, so that nothing reaches the Hub. Unset it.") from None
        except (HTTPError, json.JSONDecodeError) as error:
            if not tries_left or not _may_pass(error):
                raise PushError(_message(error, repo_id, secret)) from None
            asked = _wait_asked_for(error)
            # Not all that were cut off together come back together.
            time.sleep((wait if asked is None else asked) * random.uniform(1, 1.25))
            wait = min(2 * wait, 8.0)
        except Exception as error:
            if _CARD_REFUSED in str(error)[:_FIRST]:
                raise CardError(f"{CARD_FILE}: {hidden(error, secret, 2000)}") from None
            # huggingface_hub does not check the form of answers, and fails somehow.
            said = hidden(f"{type(error).__name__}: {error}", secret)
            raise PushError(
                f"{repo_id}: the Hub's answer has another form than it should ({said}). {_AGAIN.capitalize()}"
            ) from None
    raise AssertionError("the last try returns or raises")


@contextmanager
def _own_errors() -> Iterator[None]:
    """An error of the connection as it was: some releases of huggingface_hub hide it in a RuntimeError while they upload."""
    try:
        yield
    except RuntimeError as error:
        raise error.__cause__ if isinstance(error.__cause__, HTTPError) else error from None


def _may_pass(error: Exception) -> bool:
    if isinstance(error, json.JSONDecodeError):
        return False
    try:
        request = (error.response if isinstance(error, HfHubHTTPError) else error).request
    except RuntimeError:
        # httpx's errors know their request only where one was made.
        return False
    if request.method == "PUT" or any(part in str(request.url) for part in _RETRIED):
        return False
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in _PASSING


def _wait_asked_for(error: Exception) -> float | None:
    # What the Hub's rate limit asks for is in this header too, see `bounded_hub`.
    return seconds_to_wait(error.response.headers.get("retry-after", "")) if isinstance(error, HfHubHTTPError) else None


def _message(error: Exception, repo_id: str, secret: str | None) -> str:
    if not isinstance(error, HfHubHTTPError):
        said = hidden(error, secret)
        return f"{repo_id}: the connection to {constants.ENDPOINT} failed ({said}). {_AGAIN.capitalize()}"
    status = error.response.status_code
    said = f" ({hidden(error.server_message, secret)})" if error.server_message else ""
    other = "the Hub refused it." if status < 500 else f"the Hub has trouble. {_AGAIN.capitalize()}"
    return f"{repo_id}: {status}{said}: {_REMEDIES.get(status, other)}"


__all__ = ["PushPlan", "PushResult", "plan_push", "push_folder", "push_to_hub"]
