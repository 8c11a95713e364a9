"""The large files of the Hub of a test: sent whole or in parts, kept by their SHA-256."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Answer:
    """Status, content, and for a refusal what is wrong."""

    status: int
    content: Any = None
    code: str = ""


def refused(status: int, code: str, text: str) -> Answer:
    """Return an answer that says no."""
    return Answer(status, {"error": text}, code)


@dataclass(frozen=True)
class Asked:
    """Who asked, at which address, with what; and how addresses in the store are made."""

    token: str
    here: str
    sign: Callable[[str], str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the body."""
        content: dict[str, Any] = json.loads(self.body)
        return content


@dataclass
class Upload:
    """A large file that comes in parts."""

    oid: str
    size: int
    parts: dict[int, Path] = field(default_factory=dict)


class LargeFiles:
    """Files by their SHA-256, and what is on its way.

    Parameters
    ----------
    folder
        Where the repositories are; the files are in ``.lfs`` there.
    settings
        Returns what `Hub.use` was called with.
    """

    def __init__(self, folder: Path, settings: Callable[[], Mapping[str, Any]]) -> None:
        self._folder = folder
        self._objects = folder / ".lfs"
        self._objects.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        self._numbers = itertools.count()
        self._uploads: dict[str, Upload] = {}
        self._received: dict[str, Path] = {}

    def path(self, oid: str) -> Path:
        """Return where a file is."""
        return self._objects / oid

    def has(self, oid: str) -> bool:
        """Tell whether a file is there, all of it."""
        return self.path(oid).is_file()

    def batch(self, asked: Asked, repository: str) -> Answer:
        """Say how files are sent; of those that are there, nothing."""
        objects = []
        for wanted in asked.json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if not self.has(oid):
                answer["actions"] = {
                    "upload": self._upload_action(oid, size, asked),
                    "verify": {"href": f"{asked.here}/{repository}.git/info/lfs/objects/verify"},
                }
            objects.append(answer)
        return Answer(200, {"transfer": "basic", "objects": objects})

    def _upload_action(self, oid: str, size: int, asked: Asked) -> dict[str, Any]:
        chunk = int(self._settings().get("chunk_bytes", 5 << 30))
        if size <= chunk:
            return {"href": asked.sign(f"/.lfs/{oid}")}
        name = f"{oid}-{next(self._numbers)}"
        self._uploads[name] = Upload(oid, size)
        header = {"chunk_size": str(chunk)}
        for number in range(1, -(-size // chunk) + 1):
            header[f"{number:05d}"] = asked.sign(f"/.parts/{name}/{number}")
        return {"href": f"{asked.here}/complete/{name}", "header": header}

    @contextmanager
    def receiving(self, path: str) -> Iterator[IO[bytes]]:
        """Yield where the body of an upload goes."""
        received = self._folder / ".received" / f"{next(self._numbers)}"
        received.parent.mkdir(exist_ok=True)
        with received.open("wb") as file:
            yield file
        self._received[path] = received

    def take(self, path: str) -> Answer:
        """Take in what was received, all of it."""
        received = self._received.pop(path)
        kind, name, *rest = path.strip("/").split("/")
        if kind == ".parts":
            self._uploads[name].parts[int(rest[0])] = received
            return Answer(200)
        if hashlib.sha256(received.read_bytes()).hexdigest() != name:
            return refused(400, "", "XAmzContentSHA256Mismatch")
        received.replace(self._objects / name)
        return Answer(200)

    def complete(self, name: str, content: Mapping[str, Any]) -> Answer:
        """Put a file together of its parts."""
        upload = self._uploads[name]
        if self.has(upload.oid):  # the answer was lost, and is asked for again
            return Answer(200, {"success": True})
        whole = self._objects / f"{upload.oid}.{name}"
        with whole.open("wb") as file:
            for part in content["parts"]:
                file.write(upload.parts.pop(part["partNumber"]).read_bytes())
        if hashlib.sha256(whole.read_bytes()).hexdigest() != upload.oid:
            whole.unlink()
            return refused(400, "", "the parts are not the object")
        whole.replace(self._objects / upload.oid)
        return Answer(200, {"success": True})
