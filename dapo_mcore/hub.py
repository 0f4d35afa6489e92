"""Files of the Hugging Face hub, or of its cache where the hub is out of reach. Never code, never pickle.

Change here: how a repository is found and downloaded, and what is said if it cannot be. Which files of a model are taken is in
model_files/model_folder.py, of a data set in data/hub_split.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dapo_mcore.errors import ConfigError, one_line
from dapo_mcore.process.node_answer import answer_of_node

_TIMEOUT_S = 10.0
"""Time in which the hub must answer a first request."""


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A repository. `setting` is where the user has named it: `model.path`, or an entry of data files. revision  None: main."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None
    setting: str

    def __str__(self) -> str:
        return f"{self.name} at revision {self.revision}" if self.revision else self.name


def is_offline() -> bool:
    """Return True if nothing is downloaded: HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def download(repo: HubRepo, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """Return a folder with the files of the repository that match a pattern (those of fnmatch) and are not ignored.

    One rank of a node asks the hub, downloads what the cache lacks, and shows its progress; the others wait for its answer, be it
    an error (process/node_answer.py). Without the hub (HF_HUB_OFFLINE=1, or it does not answer) the files are those of the cache.
    Raise ConfigError that says what to do if there are none, for an unknown name or revision, a repository that asks for a token,
    and a cache that cannot be written.
    """
    question = json.dumps([repo.kind, repo.name, repo.revision, repo.setting, list(patterns), list(ignored)])
    return Path(answer_of_node(os.environ, question, lambda: _download(repo, patterns, ignored)))


def _download(repo: HubRepo, patterns: Sequence[str], ignored: Sequence[str]) -> str:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    problem = _why_out_of_reach(repo)
    options: dict[str, Any] = {
        "repo_id": repo.name,
        "repo_type": repo.kind,
        "revision": repo.revision or "main",
        "allow_patterns": list(patterns),
        "ignore_patterns": list(ignored),
    }
    if problem:
        return _cached(repo, problem, options)
    try:
        with _one_of_cache(Path(constants.HF_HUB_CACHE), repo):
            return snapshot_download(**options)
    except HfHubHTTPError as error:
        raise _refused(repo, error) from error
    except OSError as error:
        raise ConfigError(
            f"{repo.setting}: {repo} cannot be downloaded: {one_line(error)}; the cache is {constants.HF_HUB_CACHE}, HF_HOME names "
            "another place, and HF_HUB_OFFLINE=1 takes what is in it"
        ) from error


def _why_out_of_reach(repo: HubRepo) -> str:
    """Return why the hub cannot be asked, or an empty text. Raise ConfigError for what it refuses. One request, no retries."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if is_offline():
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi().repo_info(repo.name, revision=repo.revision or "main", repo_type=repo.kind, timeout=_TIMEOUT_S)
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code >= 500 or error.response.status_code == 429:
            return f"{constants.ENDPOINT} answers {one_line(error)}"
        raise _refused(repo, error) from error
    except ValueError as error:  # a name that the hub could not have
        raise ConfigError(f"{repo.setting}: {one_line(error)}") from error
    except Exception as error:  # its HTTP client's, which is not the same in all versions
        return f"{constants.ENDPOINT} does not answer ({one_line(error)})"
    return ""


def _cached(repo: HubRepo, problem: str, options: dict[str, Any]) -> str:
    from huggingface_hub import constants, snapshot_download

    try:
        return snapshot_download(**options, local_files_only=True)
    except (OSError, ValueError) as error:
        option = f" --revision {repo.revision}" if repo.revision else ""
        kind = " --repo-type dataset" if repo.kind == "dataset" else ""
        raise ConfigError(
            f"{repo.setting}: {repo} is not in the cache {constants.HF_HUB_CACHE}, and {problem}; correct the name, or run "
            f"`hf download {repo.name}{option}{kind}` on a machine that reaches the hub and copy its cache here (HF_HOME names it), or give a folder"
        ) from error


def _refused(repo: HubRepo, error: Any) -> ConfigError:
    """Return the error for an answer of the hub other than success."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    kind = {"model": "model", "dataset": "data set"}[repo.kind]
    if isinstance(error, RevisionNotFoundError):
        told = f"has no revision {repo.revision}; give a branch, a tag or a commit"
    elif isinstance(error, GatedRepoError):
        told = "gives it only to users who have accepted its conditions; accept them there, and set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        told = f"has no such {kind}, or it is private; correct the name, or set HF_TOKEN"
    else:
        told = f"answers {one_line(error)}; try again, or set HF_HUB_OFFLINE=1 to take what the cache has"
    return ConfigError(f"{repo.setting}: {repo}: {constants.ENDPOINT} {told}")


@contextmanager
def _one_of_cache(cache: Path, repo: HubRepo) -> Iterator[None]:
    """Let one process in at a time, of all jobs and nodes that share the cache. Those that had to wait show no progress."""
    from filelock import FileLock, Timeout
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    folder = cache / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"dapo_mcore--{repo.kind}--{repo.name.replace('/', '--')}.lock")
    try:
        lock.acquire(timeout=0)
        waited = False
    except Timeout:
        lock.acquire()
        waited = True
    if waited:
        disable_progress_bars()
    try:
        yield
    finally:
        lock.release()
        if waited:
            enable_progress_bars()
