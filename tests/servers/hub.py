"""A Hub of a test's own: repositories in a folder, and the store that large files lie in.

``FOLDER/org/name/COMMIT/...`` are the files of a commit, ``FOLDER/org/name/refs.json`` says which
branches and tags (``tag:NAME``) there are; ``"access"`` in it may be ``gated`` or ``private``, and
up to the time ``"busy_until"`` the answer is 429. The server is `tests.servers.hub_server`.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.servers.processes import running, wait_for_line


@dataclass
class Hub:
    """A server that runs."""

    folder: Path
    endpoint: str
    store: str
    log: Path
    _forgotten: int = 0

    def seen(self) -> list[dict[str, Any]]:
        """Return the requests so far: who (``hub``, ``store``), method, target, authorization."""
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")][self._forgotten :]

    def forget(self) -> None:
        """Let `seen` begin anew."""
        self._forgotten = 0
        self._forgotten = len(self.seen())

    def uploads(self) -> list[Uploaded]:
        """Return the bodies that were sent to the store, in the order in which they ended."""
        return [Uploaded(*s["uploaded"]) for s in self.seen() if "uploaded" in s]

    def objects(self) -> Counter[str]:
        """Return how often each large file was sent, all of it."""
        whole = (u.path for u in self.uploads() if u.is_whole and u.path.startswith("/.lfs/"))
        parts = (s["target"] for s in self.seen() if s["target"].startswith("/complete/"))
        return Counter(re.findall("[0-9a-f]{64}", path)[0] for path in (*whole, *parts))

    def commits(self, repository: str, branch: str = "main") -> list[str]:
        """Return the titles of the commits of a branch, the newest first."""
        refs = json.loads((self.folder / repository / "refs.json").read_text())
        path = self.folder / repository / "commits.json"
        about = json.loads(path.read_text()) if path.is_file() else {}
        titles, commit = [], refs[branch]
        while commit is not None:
            entry = about.get(commit, {"title": "published", "parent": None})
            titles.append(entry["title"])
            commit = entry["parent"]
        return titles

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        """Return the files of a branch by name."""
        refs = json.loads((self.folder / repository / "refs.json").read_text())
        root = self.folder / repository / refs[branch]
        paths = (path for path in root.rglob("*") if path.is_file())
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}

    def use(self, **settings: Any) -> None:
        """Set how the server behaves from now on; nothing: as usual.

        ``chunk_bytes``: larger files come in parts; ``store``: another address of the store;
        ``expires_s``: how long its addresses are good; ``busy`` and ``times``: requests that are
        answered by 429 at first; ``regular``: nothing is a large file; ``bytes_per_s``: how slowly
        bodies are received; ``left_out``: a file that commits lack.
        """
        (self.folder / ".settings.json").write_text(json.dumps(settings))


@dataclass(frozen=True)
class Uploaded:
    """A body that was sent to the store: of a whole object, or of a part."""

    path: str
    num_bytes: int
    is_whole: bool


@contextmanager
def hub_server(folder: Path, *, delay_s: float = 0, expires_s: float = 3600) -> Iterator[Hub]:
    """Serve `folder` on free ports, each answer `delay_s` late, addresses valid for `expires_s`."""
    with tempfile.TemporaryDirectory() as logs:
        log = Path(logs) / "hub.log"
        how = [str(folder.resolve()), str(delay_s), str(expires_s)]
        with running([sys.executable, "-m", "tests.servers.hub_server", *how], log) as process:
            found = wait_for_line(
                process, log, r"Serving on (http://[\d.:]+) and (http://[\d.:]+)\n"
            )
            yield Hub(folder, found[1], found[2], log)


def add_commit(
    folder: Path, repository: str, files: Mapping[str, bytes], branch: str = "main"
) -> str:
    """Put a commit on a branch; return its id."""
    digest = hashlib.sha1(repository.encode() + branch.encode())
    for name, data in sorted(files.items()):
        digest.update(name.encode() + hashlib.sha256(data).digest())
    commit = digest.hexdigest()
    for name, data in files.items():
        path = folder / repository / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    set_refs(folder, repository, **{branch: commit})
    return commit


def set_refs(folder: Path, repository: str, **more: str) -> None:
    """Set branches, or the access to a repository."""
    path = folder / repository / "refs.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, **more}))
