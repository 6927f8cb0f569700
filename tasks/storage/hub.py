"""Second moments on the Hugging Face hub: brought from a repository, published to one."""

import re
from pathlib import Path
from typing import Any

from ota_core.addresses import without_secrets
from ota_core.errors import MomentsError, StorageError
from ota_core.moments import find_moments

_ADDRESS = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-]+))?([/:](?P<file>.+))?")
MOMENTS = "exp_avg_sq*"
FILES = (".safetensors", ".json", ".pt", ".pth", ".bin")
"""How files of second moments end."""


def repository_in(address: str) -> tuple[str, str | None, str | None] | None:
    """(repository, revision, file) of ``org/name``, ``org/name@revision``, ``org/name/path/in/repo`` and ``org/name:path``; None for anything else."""
    match = _ADDRESS.fullmatch(address)
    if match is not None and match["file"] is None and Path(address).suffix in FILES:
        return None  # a folder and a file
    return None if match is None else (match["repo"], match["revision"], match["file"])


def publishes_to(out: str) -> str | None:
    """The repository that an output means: ``org/name``, where no folder ``org`` is here. None where it is a path."""
    match = _ADDRESS.fullmatch(out)
    if match is None or match["file"] or match["revision"] or Path(out).parent.exists():
        return None
    return match["repo"]


def fetch_moments(named: str, repo: str, revision: str | None, file: str | None) -> Path:
    """The file of second moments that ``named`` means, in the user's ordinary Hugging Face cache. Raises StorageError, MomentsError."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file is not None:
            return Path(hf_hub_download(repo, file, revision=revision))
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[MOMENTS]))
    except Exception as error:  # no answer at all; which class says so depends on the hub's HTTP library
        raise StorageError(
            f"preconditioner_path '{named}' is no file here, and {file or 'its second moments'} of the Hugging Face repository {repo} could not "
            f"be downloaded ({said(error)}). Check the spelling and the network, or name a local file"
        ) from error
    found = find_moments(folder) if folder.is_dir() else None
    if found is None:
        raise MomentsError(
            f"preconditioner_path '{named}': the Hugging Face repository {repo} holds no {MOMENTS}; name the file in it"
        )
    return found


def check_publishable(repo: str, *, overwrite: bool) -> None:
    """Raises StorageError where the hub does not know who asks, or the repository holds something that is not to be replaced."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().whoami()
        held = sorted(set(HfApi().list_repo_files(repo)) - {".gitattributes"})
    except RepositoryNotFoundError:
        return
    except Exception as error:
        raise _refused(repo, error) from error
    if held and not overwrite:
        raise StorageError(
            f"the Hugging Face repository {repo} holds {', '.join(held[:4])} already; choose another, or replace what is harvested, its "
            "README.md included, with --overwrite"
        )


def publish(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder's files in one commit, into a new repository where there is none; its address. Raises StorageError."""
    from huggingface_hub import HfApi

    api: Any = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Second moments")
    except Exception as error:
        raise _refused(repo, error) from error
    return f"{api.endpoint}/{repo}"


def _refused(repo: str, error: Exception) -> StorageError:
    return StorageError(
        f"nothing could be published as {repo} on the Hugging Face hub: {said(error)}. Check the network and the token (hf auth login), or "
        "name a folder such as ./out or an address in S3"
    )


def said(error: Exception) -> str:
    """An error of the hub's library in a line."""
    return f"{type(error).__name__}: {' '.join(without_secrets(str(error)).split())[:300]}"
