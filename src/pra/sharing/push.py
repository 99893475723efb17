"""Sharing a model: the folder that others get, and its upload to the Hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pra.config import check_sampling
from pra.errors import PraError
from pra.models import weights
from pra.sampling.requests import changed_sampling
from pra.sharing.card import CARD, read_origin, write_card
from pra.utils.files import check_free, new_folder
from pra.utils.hub import LOGIN, PREFIX, explained, hub_library, repo_id
from pra.utils.provenance import file_sha256


def export(
    run: str | Path,
    folder: str | Path,
    *,
    licence: str | None = None,
    half: bool = False,
    repo: str | None = None,
    average: str = weights.EMA,
    sampling: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model as a shared folder: ``config.json``, ``model.safetensors`` (an average) and ``README.md``.

    Beside them ``curves.png``, ``samples.png`` (the newest grid) and the reports of ``pra eval`` on these weights,
    where the run has them. A model folder that holds such a card already is copied with it.

    Args:
        run: a run's folder, a checkpoint or a model folder.
        folder: the new folder.
        licence: of the weights, as the Hub names it, such as ``apache-2.0``; without one the card says so.
        half: store the weights as float16: half the size, and float32 again when loaded.
        repo: ``user/model``, for the card; by default it speaks of the folder.
        average: which weights of a run, as :func:`pra.load` takes it.
        sampling: the sampler's settings to recommend, by the names of :class:`pra.config.SamplingConfig`.

    Raises:
        PraError: bad input, a weight beyond float16, or the disk refuses.
    """
    folder = Path(folder).expanduser()
    check_free(folder, "choose another folder")
    if licence is not None and not all(part.isalnum() for part in licence.replace(".", "-").split("-")):
        problem = f"--licence {licence!r} is not the name of a licence. Use the Hub's, such as apache-2.0"
        raise PraError(problem, licence=licence)
    repo = repo and repo_id(repo)
    origin = read_origin(run, average)
    if CARD in origin.files and (licence or half or sampling):
        problem = f"{run} has a card already. Leave --licence, --half and --set out, or remove {origin.files[CARD]}"
        raise PraError(problem, code="conflict", path=origin.files[CARD])
    if sampling:
        origin.model.sampling = changed_sampling(origin.model.sampling, dict(sampling))
        check_sampling(origin.model.config, origin.model.sampling)
    title, address = (repo.split("/")[1], PREFIX + repo) if repo else (folder.name, folder.name)
    if folder.absolute() == weights.SHIPPED:
        title, address = origin.run.recipe if origin.run else folder.name, ""
    with new_folder(folder) as partial:
        for file, path in origin.files.items():
            shutil.copyfile(path, partial / file)
        for file, report in origin.reports.items():
            (partial / file).write_text(report.to_json())
        if CARD in origin.files:
            shutil.copyfile(origin.weights, partial / weights.MODEL)
            weights.write_config(origin.model, partial, {weights.MODEL: file_sha256(partial / weights.MODEL)})
        else:
            weights.write_model(origin.model, partial, half)
            card = write_card(origin, title, address, licence, half)
            (partial / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")
    return folder


def push(
    run: str | Path,
    repo: str,
    *,
    private: bool = False,
    licence: str | None = None,
    half: bool = False,
    average: str = weights.EMA,
) -> str:
    """Upload a model to the Hub, as :func:`export` writes it, in one commit, and return the commit's address.

    Args:
        run: as for :func:`export`, as are ``licence``, ``half`` and ``average``.
        repo: ``user/model``, made if needed.
        private: for nobody else to see; to a page that is public already, nothing is uploaded.

    Raises:
        PraError: as :func:`export`; no token with the right to write there; or the Hub cannot be reached.
    """
    repo = repo_id(repo)
    hub = hub_library()
    api = hub.HfApi(library_name="pra")
    what = PREFIX + repo
    try:
        if hub.get_token() is None:
            raise PraError(f"no token to push {what} with: {LOGIN} with one that may write", code="missing")
        with tempfile.TemporaryDirectory() as place:
            folder = export(run, Path(place) / "model", licence=licence, half=half, repo=repo, average=average)
            api.create_repo(repo, private=private or None, exist_ok=True)
            if private and not api.model_info(repo).private:
                problem = f"{what} is public. Make it private in its settings, or leave --private out"
                raise PraError(problem, code="conflict", repo=what)
            commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by pra")
            return str(commit.commit_url)
    except (hub.errors.HTTPError, OSError, ValueError) as error:
        if isinstance(error, PraError):
            raise
        raise PraError(explained(error, what), code="unreachable") from None
