"""Processes as a lease names them: told apart from every other of this machine, and when ended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def process_of(pid: int) -> dict[str, Any] | None:
    """Return what tells a process from every other one of this machine; None if it has ended."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if fields[0] in ("Z", "X"):
        return None
    return {"boot": boot, "namespace": namespace, "pid": pid, "started": fields[19]}


def ended_here(process: Any) -> bool:  # noqa: ANN401
    """Tell whether a holder ran on this machine, since it was booted, and has ended."""
    own = process_of(os.getpid())
    if not isinstance(process, dict) or own is None:
        return False
    if any(process.get(name) != own[name] for name in ("boot", "namespace")):
        return False
    return process_of(int(process.get("pid", 0))) != process
