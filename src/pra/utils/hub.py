"""``hub:user/model`` and ``hub:user/model@revision``: a model on the Hub, downloaded once and then read from its cache.

Cache, token, endpoint and offline mode are the hub library's own (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pra.errors import PraError, reason_of
from pra.utils.extras import import_failed
from pra.utils.progress import Progress

PREFIX = "hub:"
FILES = ["config.json", "model.safetensors", "README.md"]
LOGIN = "set HF_TOKEN, or `hf auth login`"


def is_address(path: str | Path) -> bool:
    """Whether a path means a model on the Hub."""
    return str(path).startswith(PREFIX)


def download(
    address: str | Path,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder, in the hub library's cache, of a model on the Hub; what is there is not loaded again.

    Args:
        address: ``hub:user/model``, or ``hub:user/model@revision`` for a branch, tag or commit.
        cache_dir: another cache than the hub library's.
        token: another than the hub library's; ``False`` sends no token.
        local_files_only: whether the cache must do.

    Raises:
        PraError: no such model or revision, not readable, not a model of pra, or neither network nor cache.
    """
    text = Path(address).as_posix()
    name, _, revision = text.removeprefix(PREFIX).partition("@")
    repo = repo_id(name)
    hub = hub_library()
    place = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    try:
        # The configuration first: what is no model of pra may be large. A snapshot's folder is named by its commit.
        known = Path(
            hub.snapshot_download(
                repo, revision=revision or None, allow_patterns=FILES[:1], tqdm_class=_Silent, **place
            )
        )
        _check_config(known / FILES[0], text)
        folder = Path(
            hub.snapshot_download(repo, revision=known.name, allow_patterns=FILES, library_name="pra", **place)
        )
    except (hub.errors.HTTPError, OSError, ValueError) as error:
        if isinstance(error, PraError):
            raise
        raise PraError(explained(error, text), code="unreachable", address=text) from None
    if not (folder / "model.safetensors").exists():
        raise PraError(
            f"{text} is no whole model of pra: it holds no model.safetensors; push it again", code="unreadable"
        )
    return folder


def repo_id(name: str) -> str:
    """``user/model``, of which ``hub:`` may be a part.

    Raises:
        PraError: anything else.
    """
    repo = name.removeprefix(PREFIX)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII):
        raise PraError(f"{name!r} is no model on the Hub: write user/model, such as hub:alice/fashion", value=name)
    return repo


def hub_library() -> Any:
    """``huggingface_hub``.

    Raises:
        PraError: it is not installed.
    """
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise PraError(import_failed("the Hub", "huggingface_hub", "hub", error), code="not-installed") from None
    return huggingface_hub


def explained(error: Exception, what: str) -> str:
    """What went wrong between us and the Hub, and the way out, in one line.

    Args:
        error: what the hub library raised.
        what: was asked for, such as ``hub:user/model``.
    """
    errors = hub_library().errors
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # the Hub did answer
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{what} is not (wholly) in the cache, and the Hub cannot be reached: {_cause(error)}"
    if isinstance(error, errors.GatedRepoError):
        return f"{what} is gated: accept its terms on its page on the Hub, then {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{what} is not on the Hub, or is private: check the name, or {LOGIN} with a token that may read it"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what}: the Hub has the model, but no such revision; name one of its branches, tags or commits"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if status in (401, 403):
        return f"the Hub refuses {what} to this token ({status}): {LOGIN} with one that has the right to it"
    return f"the Hub and {what}: {reason_of(error)}"


class _Silent(Progress):
    """No bar."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"disable": True})


def _check_config(path: Path, address: str) -> None:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict) or not {"format", "model", "sampling"} <= set(values):
        raise PraError(
            f"{address} is no model of pra: its config.json is not there, or another library's", code="unreadable"
        )


def _cause(error: BaseException) -> str:
    if hub_library().constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it once"
    return f"{reason_of(error.__cause__ or error)}; repeat with a network"
