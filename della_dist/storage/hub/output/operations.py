"""What `huggingface_hub` calls the parts of a commit.

A shard is uploaded hours before the commit, perhaps by a process that was killed since, and its
bytes are not here any more. The library keeps what it knows of an upload in attributes of its own;
nothing else of della_dist touches them, and `tests/unit/test_hub_operations.py` fails if they
change.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


def addition(name: str, content: Path | bytes) -> CommitOperationAdd:
    """Return the operation that adds a file to a repository."""
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)


def uploaded_addition(name: str, size_bytes: int, sha256: str) -> CommitOperationAdd:
    """Return the operation that adds a file whose bytes the Hub's store for large files has."""
    from huggingface_hub.lfs import UploadInfo

    operation = addition(name, b"")
    operation.upload_info = UploadInfo(size=size_bytes, sample=b"", sha256=bytes.fromhex(sha256))
    operation._upload_mode = "lfs"
    operation._should_ignore = False
    operation._is_uploaded = True
    return operation


def is_uploaded(operation: CommitOperationAdd) -> bool:
    """Tell whether the bytes are in the store for large files; else they go with the commit."""
    return operation._is_uploaded


def is_ignored(operation: CommitOperationAdd) -> bool:
    """Tell whether a ``.gitignore`` of the repository would leave the file out of the commit."""
    return bool(operation._should_ignore)
