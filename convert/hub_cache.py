"""A commit of a repository as the hub's cache has it: what there is with HF_HUB_OFFLINE. Nothing asks the network.

The cache is the hub's client's: models--ORG--NAME/snapshots/COMMIT has the files, as links to blobs that are named
by their hashes; refs/BRANCH has the commit that a branch was at.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlx_flashmoe.convert.hub import HubFile, Repository
from mlx_flashmoe.errors import SourceError

ADVICE = "HF_HUB_OFFLINE is set: unset it to download what the hub's cache lacks"


class Snapshot(Repository):
    """A commit of the repository ``name``, with those of its files that are in the cache.

    Raises:
        SourceError: nothing of it is in the cache, or nothing of that revision.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        from huggingface_hub import constants

        self.name = name
        folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        self.commit = _commit(name, folder, revision)
        self._folder = folder / "snapshots" / self.commit
        self.files = {path.name: _file(path) for path in self._folder.iterdir() if path.is_file()}

    def small_file(self, name: str) -> Path:
        path = self._folder / name
        self.files[name].check(path)
        return path

    def cached(self, name: str) -> Path | None:
        return self._folder / name if name in self.files else None


def _commit(name: str, folder: Path, revision: str | None) -> str:
    """The commit to read: ``revision`` itself, what refs says of it, or without refs the only one there is."""
    snapshots = folder / "snapshots"
    commits = sorted(path.name for path in snapshots.iterdir()) if snapshots.is_dir() else []
    if not commits:
        raise SourceError(f"{name}: it is not in the hub's cache ({folder}); {ADVICE}")
    wanted = revision or "main"
    reference = folder / "refs" / wanted
    commit = reference.read_text().strip() if reference.is_file() else wanted
    if commit in commits:
        return commit
    # A download of a commit by its hash leaves no refs.
    if revision is None and len(commits) == 1 and not reference.exists():
        return commits[0]
    raise SourceError(
        f"{name}: revision {wanted} is not in the hub's cache ({folder}), which has {', '.join(commits[:3])}; {ADVICE}"
    )


def _file(path: Path) -> HubFile:
    """A file of a snapshot. In a cache without links its hash is not known, and its time stands for it."""
    status, blob = path.stat(), path.resolve().name
    sha256 = blob if re.fullmatch("[0-9a-f]{64}", blob) else None
    git = blob if re.fullmatch("[0-9a-f]{40}", blob) else None
    return HubFile(path.name, status.st_size, sha256, git, status.st_mtime_ns)
