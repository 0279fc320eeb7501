"""Data sets of the Hub: downloaded into a folder, where the readers find them like any other; or file by file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from t2i_align.data.shards import declared, of_split
from t2i_align.errors import UserError
from t2i_align.utils.files import atomic_folder

PREFIX = "hub:"


def folder(spec: str) -> Path:
    """The local folder of `hub:owner/name` (or `hub:owner/name@revision`), downloaded where it is not there yet.

    Without a connection, one that is in the Hub's own cache is copied from there.

    Raises:
        UserError: not such a name, no such data set, no connection.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HOME
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, revision = _parts(spec)
    # As plain files: the Hub's own cache has links that lead out of the folder, which readers refuse to follow.
    target = Path(HF_HOME) / "t2i-align" / spec.removeprefix(PREFIX).replace("/", "--")
    with _download_errors(spec):
        try:
            snapshot_download(name, repo_type="dataset", revision=revision, local_dir=target)
        except Exception:  # no connection, in the words of many libraries; raised again unless there is a copy
            with suppress(LocalEntryNotFoundError):
                cached = snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
                with atomic_folder(target) as copy:
                    shutil.copytree(cached, copy, dirs_exist_ok=True)
                return target
            raise
    return target


def pieces(spec: str, endings: tuple[str, ...]) -> tuple[list[str], str]:
    """The names of a data set's files with one of these endings, and the data set at the commit it has now.

    Of several splits, the files of `train`.
    """
    from huggingface_hub import HfApi

    name, revision = _parts(spec)
    with _download_errors(spec):
        info = HfApi().dataset_info(name, revision=revision)
        names = [file.rfilename for file in info.siblings or [] if file.rfilename.endswith(endings)]
        names = of_split(names, declared=declared(info.card_data and info.card_data.to_dict()))
    if not names:
        raise UserError(f"{spec}: no files that end in {' or '.join(endings)}, which a stream is made of")
    return names, f"{PREFIX}{name}@{info.sha}"


def piece(spec: str, name: str, folder: Path) -> Path:
    """One of a data set's files, downloaded into a folder."""
    from huggingface_hub import hf_hub_download

    repository, revision = _parts(spec)
    with _download_errors(f"{spec}/{name}"):
        return Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision, local_dir=folder))


def _parts(spec: str) -> tuple[str, str | None]:
    name, _, revision = spec.removeprefix(PREFIX).partition("@")
    if name.count("/") != 1 or name.startswith("/") or name.endswith("/"):
        raise UserError(f"{spec}: expected {PREFIX}owner/name")
    return name, revision or None


@contextmanager
def _download_errors(spec: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the Hub's, the connection's and the file system's errors
        from pipelines.hub import reason  # with diffusers, whose import takes seconds

        name = spec.removeprefix(PREFIX).partition("@")[0]
        raise UserError(f"{spec}: cannot be downloaded: {reason(f'datasets/{name}', error)}") from error
