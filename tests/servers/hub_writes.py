"""What the Hub of a test does for those who may write: repositories, uploads, commits.

A commit is a folder (`tests.servers.hub`), its large files are links to ``FOLDER/.lfs/SHA256``.
Each upload is noted with the bytes that came, also where the client went away in the middle.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.servers.hub_lfs import Answer, Asked, LargeFiles, refused

TOKEN = "hf_testtokentesttokentesttoken"
READ_TOKEN = "hf_readtokenreadtokenreadtoken"
USER = "writer"
NAMESPACES = (USER, "team")
LARGE_SUFFIXES = (".safetensors", ".bin", ".parquet")
#: Larger files are large files whatever they are called.
LARGE_BYTES = 10 << 20
#: What a new repository has.
ATTRIBUTES = "".join(
    f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES
)


_READING = ("auth-check", "refs", "commits")
_KINDS = "auth-check/write|auth-check|refs|preupload|commits|commit|branch"


def is_large(path: Path) -> bool:
    """Tell whether git has only a pointer to a file."""
    return path.name.endswith(LARGE_SUFFIXES) or path.stat().st_size > LARGE_BYTES


class Writes:
    """The changes to the repositories in a folder.

    Parameters
    ----------
    folder
        Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.large = LargeFiles(folder, lambda: self.settings)
        self._asked: Counter[str] = Counter()

    @property
    def settings(self) -> dict[str, Any]:
        """What `Hub.use` was called with."""
        path = self._folder / ".settings.json"
        settings: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return settings

    def is_busy(self, method: str, target: str) -> bool:
        """Tell whether a request is answered by 429: the first few of each that match."""
        settings = self.settings
        request = f"{method} {urlsplit(target).path}"
        if not re.search(settings.get("busy", "$^"), request):
            return False
        self._asked[request] += 1
        return self._asked[request] <= int(settings.get("times", 1))

    def answer(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes,
        sign: Callable[[str], str],
    ) -> Answer | None:
        """Answer a request to the Hub; None if it is none of those here.

        `sign` returns the address of a path in the store.
        """
        path = unquote(urlsplit(target).path).strip("/")
        token = headers.get("authorization", "").removeprefix("Bearer ")
        asked = Asked(token, f"http://{headers['host']}", sign, body)
        if path in ("api/whoami-v2", "api/validate-yaml"):
            return _who(token) if path.endswith("v2") else Answer(200, {"warnings": []})
        if path == "api/repos/create":
            return self._create(asked)
        if match := re.fullmatch(r"complete/([\w-]+)", path):
            return self.large.complete(match[1], asked.json())
        if match := re.fullmatch(r"([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)", path):
            return self._of_repository(asked, match[1], match[2], "main")
        if match := re.fullmatch(rf"api/models/([^/]+/[^/]+)/({_KINDS})(?:/(.+))?", path):
            return self._of_repository(asked, match[1], match[2], match[3] or "main")
        return None

    def _of_repository(self, asked: Asked, repository: str, what: str, revision: str) -> Answer:
        refs = self._refs(repository)
        refusal = self._refusal(repository, asked.token, reading=what in _READING)
        if refusal is not None:
            return refusal
        if what in ("preupload", "commit") and revision not in refs:
            return refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        match what:
            case "batch":
                answer = self.large.batch(asked, repository)
            case "verify":
                is_there = self.large.has(asked.json()["oid"])
                answer = Answer(200, {}) if is_there else refused(404, "", "not uploaded")
            case "refs":
                answer = Answer(200, self._branches(repository))
            case "commits":
                answer = Answer(200, self._log(repository, refs.get(revision, revision)))
            case "branch":
                answer = self._branch(asked, repository, revision)
            case "preupload":
                answer = self._preupload(asked, self._folder / repository / refs[revision])
            case "commit":
                answer = self._commit(asked, repository, revision)
            case _:  # auth-check
                answer = Answer(200, {})
        return answer

    def _branches(self, repository: str) -> dict[str, Any]:
        refs = self._refs(repository)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in refs.items()
            if re.fullmatch("[0-9a-f]{40}", commit) and not name.startswith("tag:")
        ]
        tags = [
            {"name": name[4:], "ref": f"refs/tags/{name[4:]}", "targetCommit": commit}
            for name, commit in refs.items()
            if name.startswith("tag:")
        ]
        return {"branches": branches, "tags": tags, "converts": []}

    def _branch(self, asked: Asked, repository: str, name: str) -> Answer:
        refs = self._refs(repository)
        if name in refs:
            return refused(409, "", "Reference already exists")
        start = asked.json().get("startingPoint") or refs["main"]
        self._set_refs(repository, {**refs, name: refs.get(start, start)})
        return Answer(200, {})

    def _refusal(self, repository: str, token: str, *, reading: bool = False) -> Answer | None:
        refs = self._refs(repository)
        if not refs or (refs.get("access") == "private" and token not in (TOKEN, READ_TOKEN)):
            status = 404 if token in (TOKEN, READ_TOKEN) else 401
            return refused(status, "RepoNotFound", "Repository not found")
        mine = repository.split("/", maxsplit=1)[0] in NAMESPACES
        if not reading and (token != TOKEN or not mine):
            return refused(403, "", "Forbidden: you must have write access to this repo.")
        return None

    def _create(self, asked: Asked) -> Answer:
        content = asked.json()
        owner = content.get("organization") or USER
        repository = f"{owner}/{content['name']}"
        if asked.token != TOKEN or owner not in NAMESPACES:
            return refused(403, "", f"You don't have the rights to create a model under {owner}")
        url = f"{asked.here}/{repository}"
        if self._refs(repository):
            return Answer(409, {"error": "You already created this model repo", "url": url})
        is_private = content.get("visibility") == "private" or content.get("private")
        access = {"access": "private"} if is_private else {}
        commit = self._number(repository)
        root = self._folder / repository / commit
        root.mkdir(parents=True)
        (root / ".gitattributes").write_text(ATTRIBUTES)
        self._note(repository, commit, None, "initial commit")
        self._set_refs(repository, {"main": commit, **access})
        return Answer(200, {"url": url})

    def _preupload(self, asked: Asked, root: Path) -> Answer:
        ignored = (root / ".gitignore").is_file()
        return Answer(
            200,
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": self._mode(file),
                        "shouldIgnore": ignored and file["path"].endswith(".safetensors"),
                    }
                    for file in asked.json()["files"]
                ]
            },
        )

    def _mode(self, file: Mapping[str, Any]) -> str:
        large = file["size"] > LARGE_BYTES or file["path"].endswith(LARGE_SUFFIXES)
        return "lfs" if large and not self.settings.get("regular") else "regular"

    def _commit(self, asked: Asked, repository: str, branch: str) -> Answer:
        lines = [json.loads(line) for line in asked.body.splitlines()]
        refs = self._refs(repository)
        parent = refs[branch]
        header, *operations = lines
        if header["value"].get("parentCommit", parent) != parent:
            return refused(412, "", "A commit has happened since. Please refresh and try again.")
        for operation in operations:
            value = operation["value"]
            if (
                operation["key"] == "lfsFile"
                and not (self._folder / ".lfs" / value["oid"]).is_file()
            ):
                return refused(400, "", "LFS pointer pointed to a file that does not exist")
        commit = self._number(repository)
        root = self._folder / repository / commit
        shutil.copytree(self._folder / repository / parent, root, copy_function=os.link)
        for operation in operations:
            value = operation["value"]
            if value["path"] == self.settings.get("left_out"):
                continue
            path = root / value["path"]
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            if operation["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                path.hardlink_to(self.large.path(value["oid"]))
        self._note(repository, commit, parent, header["value"]["summary"])
        self._set_refs(repository, {**refs, branch: commit})
        url = f"{asked.here}/{repository}/commit/{commit}"
        return Answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def _refs(self, repository: str) -> dict[str, str]:
        path = self._folder / repository / "refs.json"
        refs: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
        return refs

    def _set_refs(self, repository: str, refs: Mapping[str, str]) -> None:
        (self._folder / repository / "refs.json").write_text(json.dumps(refs))

    def _number(self, repository: str) -> str:
        return hashlib.sha1(f"{repository} {os.urandom(8).hex()}".encode()).hexdigest()

    def _note(self, repository: str, commit: str, parent: str | None, title: str) -> None:
        path = self._folder / repository / "commits.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**known, commit: {"parent": parent, "title": title}}))

    def _log(self, repository: str, commit: str | None) -> list[dict[str, Any]]:
        path = self._folder / repository / "commits.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        found = []
        while commit is not None:
            about = known.get(commit, {"parent": None, "title": "published"})
            entry = {"id": commit, "title": about["title"], "message": "", "authors": []}
            found.append({**entry, "date": "2026-01-01T00:00:00.000Z"})
            commit = about["parent"]
        return found


def _who(token: str) -> Answer:
    if token not in (TOKEN, READ_TOKEN):
        return refused(401, "", "Invalid username or password.")
    role = "write" if token == TOKEN else "read"
    user = {"type": "user", "name": USER, "orgs": [{"name": "team"}]}
    return Answer(200, {**user, "auth": {"accessToken": {"role": role}}})
