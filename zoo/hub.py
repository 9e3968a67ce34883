"""Fetch files from the Hugging Face Hub and publish folders there, with errors that say in one line what to do.

Downloads go to the Hub client's own cache. `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` work as always.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from zoo.text import first_line

__all__ = [
    "HubError",
    "HubFileMissingError",
    "blob_digest",
    "check_repo_id",
    "download",
    "files_of",
    "is_offline",
    "list_files",
    "upload",
]

AnswerT = TypeVar("AnswerT")

_PATIENCE = 8.0  # seconds until a Hub that does not answer is said to be away; the client itself takes half a minute
_WAITS = (0.5, 1.5)  # seconds between tries

_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubError(OSError):
    """The Hub could not give or take a file."""


class HubFileMissingError(HubError):
    """The repository exists and has no such file."""


def download(repo_id: str, filename: str, *, cache_dir: str | Path | None = None) -> Path:
    """Return the local path of a file of a Hub repository, downloading it unless the newest version is cached.

    Args:
        repo_id: "org/name", or "org/name@revision".
        filename: Path in the repository.
        cache_dir: Folder for downloads; None takes the Hub client's own.

    Raises:
        HubFileMissingError: The repository has no such file.
        HubError: The repository does not exist or is closed, the Hub cannot be reached, or `HF_HUB_OFFLINE` is set and
            the file is not in the cache.
    """
    repository, _, revision = repo_id.partition("@")
    with _explained(repository, filename):
        if not is_offline():
            url = hf_hub_url(repository, filename, revision=revision or None, endpoint=constants.ENDPOINT)
            try:
                _few_tries(lambda left: get_hf_file_metadata(url, timeout=left, endpoint=constants.ENDPOINT))
            except (HTTPError, HfHubHTTPError) as error:  # the client itself would try on for half a minute
                if isinstance(error, HfHubHTTPError) and not _is_passing(error):
                    raise
                cached = try_to_load_from_cache(repository, filename, cache_dir=cache_dir, revision=revision or None)
                if isinstance(cached, str):
                    return Path(cached)
                raise
        return Path(hf_hub_download(repository, filename, revision=revision or None, cache_dir=cache_dir))


def list_files(repo_id: str) -> list[str]:
    """Return the paths of all files of a Hub repository, sorted.

    Args:
        repo_id: "org/name", or "org/name@revision".

    Raises:
        HubError: As in `download`.
    """
    repository, _, revision = repo_id.partition("@")
    if is_offline():
        raise HubError(f"HF_HUB_OFFLINE is set: the files of {repository} cannot be listed.")
    with _explained(repository):
        info = _few_tries(lambda left: HfApi().model_info(repository, revision=revision or None, timeout=left))
    return sorted(sibling.rfilename for sibling in info.siblings or ())


def _few_tries(ask: Callable[[float], AnswerT]) -> AnswerT:
    """Ask again, twice, where the Hub is only busy for the moment; `ask` is given the seconds that are left."""
    end = time.monotonic() + _PATIENCE
    for seconds in _WAITS:
        try:
            return ask(end - time.monotonic())
        except HfHubHTTPError as error:
            if not _is_passing(error) or time.monotonic() + seconds + 1 > end:
                raise
            time.sleep(seconds)
    return ask(max(1.0, end - time.monotonic()))


def _is_passing(error: HfHubHTTPError) -> bool:
    """Tell whether an error may pass by itself: too many requests, or the server's own fault."""
    return error.response.status_code == 429 or error.response.status_code >= 500


def is_offline() -> bool:
    """Tell whether `HF_HUB_OFFLINE` forbids downloads."""
    return bool(constants.HF_HUB_OFFLINE)


def blob_digest(path: str | Path) -> str | None:
    """Return the SHA-256 digest that the Hub states for a large file in its cache; None for any other file.

    The cache stores a large file under its digest and links to it; nothing compares the two when the file is used.
    """
    blob = Path(path).resolve()
    return blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None


def upload(folder: str | Path, repo_id: str, *, token: str | None = None, message: str | None = None) -> str:
    """Publish all files of a folder in one commit, creating the repository if need be, and return the commit's URL.

    Args:
        folder: Hidden files are left out.
        repo_id: "org/name".
        token: Access token with write permission; None takes the one that `hf auth login` stored, or `HF_TOKEN`.
        message: First line of the commit.

    Raises:
        HubError: The token is missing or may not write there, or the Hub cannot be reached.
    """
    folder = Path(folder)
    if is_offline():
        raise HubError(f"HF_HUB_OFFLINE is set: {repo_id} cannot be published offline.")
    files = files_of(folder)
    additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    api = HfApi(token=token, library_name="ffn-zoo")
    with _explained(repo_id):
        api.create_repo(repo_id, exist_ok=True)
        commit = api.create_commit(repo_id, additions, commit_message=message or f"Publish {folder.name}")
    return commit.commit_url


def files_of(folder: Path) -> list[Path]:
    """Return the files of a folder that are published: all but hidden ones and Python caches."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    )


def check_repo_id(repo_id: str) -> None:
    """Refuse what the Hub would refuse as the name of a repository, without asking it.

    Raises:
        HubError: It is not `org/name`, of letters, digits, `-`, `_` and `.`.
    """
    with _explained(repo_id):
        validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise HubError(f"{repo_id!r} is no Hub id: it must be 'org/name'.")


@contextmanager
def _explained(repo_id: str, filename: str | None = None) -> Iterator[None]:
    """Turn the client's errors into one line each."""
    file = f"{repo_id}/{filename}" if filename else repo_id
    try:
        yield
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no Hub id: it must be 'org/name'.") from error
    except RemoteEntryNotFoundError as error:
        raise HubFileMissingError(f"{repo_id} on {_host()} has no file {filename!r}.") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} on {_host()} has no such revision.") from error
    except GatedRepoError as error:
        raise HubError(
            f"{repo_id} on {_host()} is gated: ask for access on its page, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{_host()} shows no repository {repo_id!r}: check the name; if it is private, log in with `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        if is_offline():
            cause = "HF_HUB_OFFLINE is set"
        elif isinstance(error.__cause__, FileMetadataError):
            cause = f"{_host()} does not answer as a Hub does (HF_ENDPOINT, proxy?)"
        else:
            cause = f"{_host()} cannot be reached"
        raise HubError(
            f"{file} is not in the download cache and {cause}; fetch it where there is a network with"
            f" `hf download {repo_id} {filename}` and copy {constants.HF_HUB_CACHE} (HF_HUB_CACHE) here."
        ) from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403):
            raise HubError(
                f"{_host()} refused access to {repo_id} ({code}): log in with `hf auth login` or give a token that may."
            ) from error
        kept = f" It is not in the download cache {constants.HF_HUB_CACHE} (HF_HUB_CACHE)." if filename else ""
        raise HubError(f"{_host()} answered {code} for {file}: {first_line(error)}.{kept} Try again later.") from error
    except ValueError as error:  # the Hub does not accept the front matter of README.md
        raise HubError(f"{repo_id}: {' '.join(str(error).split())}") from error
    except (HTTPError, OSError) as error:
        if filename and isinstance(error, HTTPError):
            raise HubError(
                f"{file} is not in the download cache {constants.HF_HUB_CACHE} (HF_HUB_CACHE) and {_host()} cannot be"
                f" reached ({type(error).__name__}); fetch it where there is a network with `hf download"
                f" {repo_id} {filename}` and copy that folder here."
            ) from error
        if isinstance(error, HTTPError):
            raise HubError(f"{_host()} cannot be reached for {repo_id} ({type(error).__name__}).") from error
        raise HubError(f"{file}: {type(error).__name__}: {first_line(error)}") from error


def _host() -> str:
    return constants.ENDPOINT.removeprefix("https://").removeprefix("http://")
