"""The server of `tests.servers.hub`: the Hub, and the store behind it.

The answers are those that huggingface.co gives to `huggingface_hub`: model information, the tree in
pages, ``resolve`` of a small file by its bytes, and of a large one by a redirection to another
address. That one is signed, for a while, and must never see the token. What those do who may write
is in `tests.servers.hub_writes`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.servers.hub_lfs import Answer
from tests.servers.hub_writes import READ_TOKEN, TOKEN, Writes, is_large
from tests.servers.static import REASONS, byte_range
from tests.servers.wire import Head, Wire, listen, serve

SECRET = b"of the store"
#: Entries of a page of the tree.
PAGE = 3
_REASONS = {
    **REASONS,
    302: "Found",
    401: "Unauthorized",
    403: "Forbidden",
    409: "Conflict",
    429: "Too Many Requests",
}


class Answers:
    """What both servers say."""

    def __init__(self, folder: Path, delay_s: float, expires_s: float, store: str) -> None:
        self._folder = folder
        self._delay_s = delay_s
        self._expires_s = expires_s
        self._store = store
        self._etags: dict[Path, str] = {}
        self._writes = Writes(folder)

    async def hub(self, client: Wire) -> None:
        """Serve one connection to the Hub."""
        while head := await client.head():
            body = b"".join(
                [
                    bytes(p)
                    async for p, is_content in client.body(head.request_framing())
                    if is_content
                ]
            )
            await self._note(head, "hub")
            if self._writes.is_busy(head.method, head.target):
                await _send(client, head, 429, b"", {"Retry-After": "1"})
            else:
                answer = self._writes.answer(
                    head.method, head.target, head.headers, body, self._signed
                )
                if answer is None:
                    await self._hub(client, head)
                else:
                    await _give(client, head, answer)
            if head.closes:
                return

    async def store(self, client: Wire) -> None:
        """Serve one connection to the store behind it."""
        while head := await client.head():
            url = urlsplit(head.target)
            query = {k: v[0] for k, v in parse_qs(url.query).items()}
            path = self._folder / unquote(url.path).strip("/")
            is_signed = hmac.compare_digest(
                _signature(url.path, query.get("Expires", "")), query.get("Signature", "")
            )
            if head.method == "PUT":
                await self._take(client, head, url.path)
            else:
                await client.discard(head.request_framing())
                await self._note(head, "store")
            if self._writes.is_busy(head.method, head.target):
                await _send(client, head, 429, b"", {"Retry-After": "1"})
            elif "authorization" in head.headers or not is_signed:
                await _send(client, head, 400, b"InvalidArgument")
            elif time.time() > float(query["Expires"]):
                await _send(client, head, 403, b"AccessDenied")
            elif head.method == "PUT":
                taken = self._writes.large.take(url.path)
                etag = hashlib.sha256(url.path.encode()).hexdigest()
                await _give(client, head, taken, {"ETag": f'"{etag}"'})
            else:
                await self._send_file(client, head, path)
            if head.closes:
                return

    async def _note(self, head: Head, who: str, **more: Any) -> None:
        seen = {"who": who, "method": head.method, "target": head.target}
        seen["authorization"] = head.headers.get("authorization", "")
        print(json.dumps({**seen, **more}), flush=True)
        await asyncio.sleep(self._delay_s)

    async def _take(self, client: Wire, head: Head, path: str) -> None:
        """Receive a body that is sent to the store, as slowly as is wanted."""
        num_bytes, is_whole = 0, False
        bytes_per_s = self._writes.settings.get("bytes_per_s")
        try:
            with self._writes.large.receiving(path) as file:
                async for piece, is_content in client.body(head.request_framing()):
                    if is_content:
                        file.write(piece)
                        num_bytes += len(piece)
                    if bytes_per_s:
                        await asyncio.sleep(len(piece) / bytes_per_s)
            is_whole = True
        finally:
            await self._note(head, "store", uploaded=[path, num_bytes, is_whole])

    def _signed(self, path: str) -> str:
        """Return the address in the store of a path in the folder, good for a while."""
        settings = self._writes.settings
        where = quote(path)
        expires = str(time.time() + settings.get("expires_s", self._expires_s))
        store = settings.get("store", self._store)
        return f"{store}{where}?Expires={expires}&Signature={_signature(where, expires)}"

    async def _hub(self, client: Wire, head: Head) -> None:
        url = urlsplit(head.target)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        org, name, kind, *rest = [*(parts[2:] if is_api else parts), "", "", ""]
        rest = rest[:-3] if kind else []
        refs_path = self._folder / org / name / "refs.json"
        refs = json.loads(refs_path.read_text()) if refs_path.is_file() else None
        tokens = (f"Bearer {TOKEN}", f"Bearer {READ_TOKEN}")
        allowed = head.headers.get("authorization") in tokens
        access = "" if refs is None else refs.get("access", "")
        if refs is None or (access == "private" and not allowed):
            await _refuse(
                client, head, 404 if allowed else 401, "RepoNotFound", "Repository not found"
            )
            return
        if time.time() < float((refs or {}).get("busy_until", 0)):
            await _send(client, head, 429, b"", {"Retry-After": "1"})
            return
        if access == "gated" and not allowed and not (is_api and kind == "revision"):
            text = f"Access to model {org}/{name} is restricted."
            await _refuse(client, head, 403, "GatedRepo", text)
            return
        revision = rest[0] if rest else "main"
        commit = refs.get(revision, revision)
        root = self._folder / org / name / commit
        if revision == "access" or not root.is_dir():
            text = f"Invalid rev id: {revision}"
            await _refuse(client, head, 404, "RevisionNotFound", text)
        elif is_api and kind == "revision":
            info = {"id": f"{org}/{name}", "modelId": f"{org}/{name}", "sha": commit, "tags": []}
            info |= {"private": access == "private", "downloads": 0, "likes": 0}
            info["siblings"] = [
                _sibling(entry) for entry in self._entries(root) if entry["type"] == "file"
            ]
            await _send_json(client, head, info)
        elif is_api and kind == "tree":
            await self._tree(client, head, root)
        elif kind == "resolve":
            await self._resolve(client, head, root, "/".join(rest[1:]))
        else:
            await _send(client, head, 404, b"")

    async def _tree(self, client: Wire, head: Head, root: Path) -> None:
        url = urlsplit(head.target)
        first = int(parse_qs(url.query).get("cursor", ["0"])[0])
        entries = self._entries(root)
        more = {}
        if first + PAGE < len(entries):
            following = f"{url.path}?recursive=True&expand=False&cursor={first + PAGE}"
            more["Link"] = f'<http://{head.headers["host"]}{following}>; rel="next"'
        await _send_json(client, head, entries[first : first + PAGE], more)

    def _entries(self, root: Path) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        for path in sorted(root.rglob("*")):
            key = path.relative_to(root).as_posix()
            if path.is_dir():
                entries.append({"type": "directory", "path": key, "oid": "0" * 40, "size": 0})
                continue
            entry = {"type": "file", "path": key, "size": path.stat().st_size}
            entry["oid"] = hashlib.sha1(key.encode()).hexdigest()
            if is_large(path):
                entry["lfs"] = {"oid": self._etag(path), "size": entry["size"], "pointerSize": 134}
            else:
                entry["oid"] = self._etag(path)
            entries.append(entry)
        return entries

    async def _resolve(self, client: Wire, head: Head, root: Path, key: str) -> None:
        path = root / key
        if not path.is_file():
            await _refuse(client, head, 404, "EntryNotFound", "Entry not found")
            return
        about = {"X-Repo-Commit": root.name}
        if not is_large(path):
            await self._send_file(client, head, path, {**about, "ETag": f'"{self._etag(path)}"'})
            return
        signed = self._signed(f"/{path.relative_to(self._folder).as_posix()}")
        about |= {"X-Linked-ETag": f'"{self._etag(path)}"', "Location": signed}
        about["X-Linked-Size"] = str(path.stat().st_size)
        await _send(client, head, 302, b"", about)

    def _etag(self, path: Path) -> str:
        """Return the SHA-256 of a large file, and what git calls a small one."""
        if path not in self._etags:
            data = path.read_bytes()
            in_git = hashlib.sha1(b"blob %d\0" % len(data) + data)
            found = hashlib.sha256(data) if is_large(path) else in_git
            self._etags[path] = found.hexdigest()
        return self._etags[path]

    async def _send_file(
        self, client: Wire, head: Head, path: Path, about: Mapping[str, str] = {}
    ) -> None:
        size = path.stat().st_size
        start, stop, status, more = 0, size, 200, dict(about)
        if wanted := head.headers.get("range"):
            found = byte_range(wanted, size)
            if found is None:
                await _send(client, head, 416, b"")
                return
            (start, stop), status = found, 206
            more["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        await client.send(_head(status, stop - start, more))
        if head.method == "GET" and start < stop:
            with path.open("rb") as file:
                loop = asyncio.get_running_loop()
                await loop.sock_sendfile(client.sock, file, start, stop - start)


def _sibling(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of the tree as model information has it."""
    sibling = {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
    if lfs := entry.get("lfs"):
        sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 134}
    return sibling


def _signature(path: str, expires: str) -> str:
    return hmac.new(SECRET, f"{path} {expires}".encode(), "sha256").hexdigest()


def _head(status: int, length: int, more: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in more.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _send(
    client: Wire, request: Head, status: int, body: bytes, more: Mapping[str, str] = {}
) -> None:
    await client.send(_head(status, len(body), more) + (b"" if request.method == "HEAD" else body))


async def _send_json(
    client: Wire, request: Head, content: object, more: Mapping[str, str] = {}
) -> None:
    about = {"Content-Type": "application/json", **more}
    await _send(client, request, 200, json.dumps(content).encode(), about)


async def _give(client: Wire, request: Head, answer: Answer, more: Mapping[str, str] = {}) -> None:
    if answer.code or answer.status >= 400:
        await _refuse(client, request, answer.status, answer.code, answer.content)
    else:
        about = {"Content-Type": "application/json", **more}
        body = b"" if answer.content is None else json.dumps(answer.content).encode()
        await _send(client, request, answer.status, body, about)


async def _refuse(
    client: Wire, request: Head, status: int, code: str, text: str | Mapping[str, Any]
) -> None:
    content = {"error": text} if isinstance(text, str) else text
    body, text = json.dumps(content).encode(), content["error"]
    about = {"X-Error-Code": code, "X-Error-Message": text, "Content-Type": "application/json"}
    await _send(client, request, status, body, about)


async def _main(folder: Path, delay_s: float, expires_s: float) -> None:
    host = "127.0.0.1"
    hub, store = listen(host), listen(host)
    hub_url, store_url = (f"http://{host}:{sock.getsockname()[1]}" for sock in (hub, store))
    answers = Answers(folder, delay_s, expires_s, store_url)
    print(f"Serving on {hub_url} and {store_url}", flush=True)
    await asyncio.gather(serve(hub, answers.hub), serve(store, answers.store))


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])))
