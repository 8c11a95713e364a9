"""s3rver, an S3 server of the npm registry that many projects test with: it lacks a good deal.

    npm install --global s3rver@3.7.1

It knows no conditional writes (If-None-Match and If-Match of a PUT are ignored without a word) and
no listing of unfinished uploads (501).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers.processes import need_programs, running, wait_for_line

#: Of the one account that it has.
S3RVER_KEYS = ("S3RVER", "S3RVER")


@contextmanager
def s3rver_server() -> Iterator[str]:
    """Run a server on a free port with an empty folder; yield its endpoint URL.

    Skips the test where s3rver is not on the path.
    """
    need_programs("s3rver", get="npm install --global s3rver@3.7.1")
    with tempfile.TemporaryDirectory(prefix="s3rver") as folder:
        log = Path(folder) / "s3rver.log"
        command = ["s3rver", "-d", f"{folder}/data", "-a", "127.0.0.1", "-p", "0"]
        with running([*command, "--no-vhost-buckets"], log) as process:
            found = wait_for_line(process, log, r"listening on ([\d.]+:\d+)")
            yield f"http://{found[1]}"
