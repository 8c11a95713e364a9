"""Ceph's S3 server, the most real one that runs on a test machine.

    apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common

A monitor, one OSD that holds everything in memory, and the RADOS gateway, all on 127.0.0.1, with
cephx, in a temporary folder; nothing of a Ceph that the machine may have is read or written.

What Ceph 16.2 does and moto does not: it verifies signatures, the payload's SHA-256 and
Content-MD5, and answers them with 403 or 400. What it lacks: it ignores conditions on
CompleteMultipartUpload (whose answer has an empty ETag) and on DELETE, takes a PUT's If-Match only
without quotes, and ignores checksum headers (CRC32, SHA256, CRC64NVME) altogether.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.servers.moto import ACCESS_KEY, SECRET_KEY
from tests.servers.processes import need_programs, running, wait_for_line

CONFIG = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}
public addr = 127.0.0.1
ms bind msgr2 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
run dir = {folder}
admin socket = {folder}/$name.$pid.asok
pid file =
log file =
log to stderr = true
err to stderr = true
mon cluster log file = {folder}/cluster.log
# One OSD: a single copy, on the one host, and no manager that would look after it.
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
osd objectstore = memstore
memstore device bytes = {capacity_bytes}
# A monitor stops where less of the disk is free than this many per cent (else 5).
mon data avail crit = 1
rgw frontends = beast endpoint=127.0.0.1:{port}
# Deleted objects would keep their memory for two hours.
rgw gc obj min wait = 5
rgw gc processor period = 5
"""
KEYS = {
    "mon.": ("mon", "allow *"),
    "client.admin": ("mon", "allow *", "osd", "allow *"),
    "osd.0": ("mon", "allow profile osd", "osd", "allow *"),
    "client.rgw": ("mon", "allow rw", "osd", "allow rwx"),
}


@contextmanager
def rgw_server(capacity_bytes: int = 4 * 2**30) -> Iterator[str]:
    """Run a gateway with an empty store; yield its endpoint URL.

    It is up after about 14 s, takes about 1 GiB of memory, and knows one user, the one of
    `moto.s3_environment`. Skips the test where Ceph is not installed.
    """
    need_programs(
        *("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw"),
        "radosgw-admin",
        get="apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common",
    )
    with tempfile.TemporaryDirectory(prefix="rgw") as name, ExitStack() as stack:
        folder = Path(name)
        config = folder / "ceph.conf"
        fsid = str(uuid.uuid4())
        mon_port, port = _free_port(), _free_port()
        config.write_text(
            CONFIG.format(
                folder=folder,
                fsid=fsid,
                mon_port=mon_port,
                port=port,
                capacity_bytes=capacity_bytes,
            )
        )
        for data in ("mon", "osd", "rgw"):
            (folder / data).mkdir()
        use = ("--conf", str(config))
        keyring = str(folder / "keyring")
        _run("ceph-authtool", "--create-keyring", keyring)
        for who, caps in KEYS.items():
            pairs = zip(caps[::2], caps[1::2], strict=True)
            options = [o for what, cap in pairs for o in ("--cap", what, cap)]
            _run("ceph-authtool", keyring, "--gen-key", "-n", who, *options)
        monmap = str(folder / "monmap")
        address = f"[v1:127.0.0.1:{mon_port}]"
        _run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        _run("ceph-mon", *use, "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        stack.enter_context(running(["ceph-mon", *use, "-f", "-i", "a"], folder / "mon.log"))
        osd = str(uuid.uuid4())
        _run("ceph", *use, "osd", "new", osd)
        _run("ceph-osd", *use, "-i", "0", "--mkfs", "--osd-uuid", osd)
        stack.enter_context(running(["ceph-osd", *use, "-f", "-i", "0"], folder / "osd.log"))
        log = folder / "rgw.log"
        gateway = stack.enter_context(running(["radosgw", *use, "-f", "-n", "client.rgw"], log))
        _run(
            *("radosgw-admin", *use, "user", "create", "--uid", "tests", "--display-name", "tests"),
            *("--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY),
        )
        wait_for_line(gateway, log, "starting handler: beast", 60)
        yield f"http://127.0.0.1:{port}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def _run(*command: str) -> None:
    """Run one command of the installation; what it says is in the error if it fails."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
