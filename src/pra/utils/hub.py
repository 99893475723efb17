"""``hub:user/model`` and ``hub:user/model@revision``: models on the Hub, downloaded once into the hub library's cache.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE set the cache, the token, the server and the offline mode.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pra.errors import PraError, reason_of
from pra.utils.extras import import_failed
from pra.utils.files import read_json
from pra.utils.progress import Progress

PREFIX = "hub:"
FILES = ["config.json", "model.safetensors", "README.md", "pareto.json"]
LOGIN = "set HF_TOKEN, or `hf auth login`"


def is_address(path: str | Path) -> bool:
    """Return whether a path means a model on the Hub."""
    return str(path).startswith(PREFIX)


def download(
    address: str | Path,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder of a model, in the hub library's cache or in ``cache_dir``. Cached files are not loaded again.

    ``token=False`` sends no token; with ``local_files_only`` nothing is asked of the Hub.

    Raises:
        PraError: no such model or revision, not readable, not a model of pra, or neither network nor cache.
    """
    text = Path(address).as_posix()
    name, _, revision = text.removeprefix(PREFIX).partition("@")
    repo = repo_id(name)
    hub = hub_library()
    place = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    try:
        # The configuration first: another library's model may be large. A snapshot's folder is named by its commit.
        known = hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=FILES[:1], tqdm_class=_Silent, **place
        )
        if not _is_ours(Path(known) / FILES[0]):
            problem = "its config.json is not there, or another library's"
            raise PraError(f"{text} is not a model of pra: {problem}", code="unreadable", address=text)
        commit = Path(known).name
        folder = Path(hub.snapshot_download(repo, revision=commit, allow_patterns=FILES, library_name="pra", **place))
    except (hub.errors.HTTPError, OSError, ValueError) as error:
        if isinstance(error, PraError):
            raise
        raise PraError(explained(error, text), code="unreachable", address=text) from None
    if not (folder / "model.safetensors").exists():
        raise PraError(f"{text} lacks model.safetensors. Push it again", code="unreadable", address=text)
    return folder


def repo_id(name: str) -> str:
    """Return ``user/model``, from which ``hub:`` is removed. Refuse anything else."""
    repo = name.removeprefix(PREFIX)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII):
        raise PraError(f"{name!r} is not a model on the Hub. Write user/model, such as hub:alice/fashion", value=name)
    return repo


def hub_library() -> Any:
    """Import and return ``huggingface_hub``. Refuse if it is missing."""
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise PraError(import_failed("the Hub", "huggingface_hub", "hub", error), code="not-installed") from None
    return huggingface_hub


def explained(error: Exception, what: str) -> str:
    """Return one line about an error of the hub library, and the fix; ``what`` was asked for: ``hub:user/model``."""
    errors = hub_library().errors
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # the Hub did answer
    if isinstance(error, errors.LocalEntryNotFoundError):
        offline = hub_library().constants.HF_HUB_OFFLINE
        cause = reason_of(error.__cause__ or error)
        fix = "HF_HUB_OFFLINE is set; unset it once" if offline else f"{cause}; repeat with a network"
        return f"{what} is not completely in the cache, and the Hub cannot be reached: {fix}"
    if isinstance(error, errors.GatedRepoError):
        return f"{what} is gated: accept its terms on its page on the Hub, then {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{what} is not on the Hub, or is private: check the name, or {LOGIN} with a token that may read it"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what}: the Hub has the model, but not this revision; name one of its branches, tags or commits"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if status in (401, 403):
        return f"the Hub refuses {what} to this token ({status}): {LOGIN} with a token that may read it"
    return f"the Hub and {what}: {reason_of(error)}"


class _Silent(Progress):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"disable": True})


def _is_ours(config: Path) -> bool:
    try:
        return {"format", "model", "sampling"} <= set(read_json(config))
    except PraError:
        return False
