# mypy: disable-error-code="import-untyped,no-untyped-call,misc"
"""Compiled kernels on the disk: a cache that may be damaged, full or forbidden, and stops nothing.

Numba's own cache believes what it finds. A file that a power cut left empty ends every later start,
machine code with a flipped bit runs, and a process that is killed between writing the index and
the code leaves an index that names older code. Here one file holds one kernel: a digest of all that
follows, the digest of what it was compiled from and for, and the code. What does not match is
compiled again and replaced.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import caching
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile

log = logging.getLogger("della_dist.run")

_DIGEST_BYTES = 32
#: What has been said; one line a process is enough.
_warned: list[str] = []


class _Places(CompileResultCacheImpl):
    """Where kernels may be cached: beside the package only where the user has no cache.

    What is left there would outlive the package, as an empty one of its name.
    """

    _locator_classes = [  # noqa: RUF012
        caching.UserProvidedCacheLocator,
        caching.UserWideCacheLocator,
        caching.InTreeCacheLocator,
        caching.ZipCacheLocator,
    ]


class KernelCache(FunctionCache):
    """The cache of one kernel. Whatever goes wrong with it, the kernel is compiled.

    Raises
    ------
    RuntimeError
        If there is no folder to cache in.
    """

    _impl_class = _Places

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _KernelFiles(self._impl.filename_base, self._impl.locator)

    def load_overload(self, sig: Any, target_context: Any) -> Any:  # noqa: ANN401
        """Return the compiled kernel; None if it is to be compiled."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            self._warn(error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:  # noqa: ANN401
        """Keep the compiled kernel, if that is possible."""
        try:
            super().save_overload(sig, data)
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if isinstance(error, _DamagedError):
            warning = f"{error} is damaged: the kernels are compiled again, and it is replaced."
        else:
            warning = (
                f"the kernel cache {self._cache_path} cannot be used "
                f"({str(error) or type(error).__name__}): the kernels are compiled at every start, "
                "which takes some seconds. Make room there, or set NUMBA_CACHE_DIR to a folder "
                "that can be written."
            )
        if not _warned:
            _warned.append(warning)
            log.warning("%s", warning)


class _DamagedError(ValueError):
    """A file of the cache does not hold what was written; the message is its path."""


class _KernelFiles(IndexDataCacheFile):
    """The files of one kernel: one for every signature and processor, without an index."""

    def __init__(self, name: str, locator: Any) -> None:  # noqa: ANN401
        super().__init__(locator.get_cache_path(), name, locator.get_source_stamp())
        self._start = Path(locator.get_cache_path()) / name

    def load(self, key: Any) -> Any:  # noqa: ANN401
        """Return what was saved under `key`; None if nothing was."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if data[:_DIGEST_BYTES] != _digest(data[_DIGEST_BYTES:]):
            raise _DamagedError(str(path))
        if data[_DIGEST_BYTES : 2 * _DIGEST_BYTES] != self._identity(key):
            return None  # of other sources, or of another version of Numba
        return pickle.loads(data[2 * _DIGEST_BYTES :])

    def save(self, key: Any, data: Any) -> None:  # noqa: ANN401
        """Save `data` under `key`, in place of what other sources left there."""
        content = self._identity(key) + self._dump(data)
        # Appears whole or not at all, unless the power fails, which the digest shows.
        with self._open_for_write(str(self._path(key))) as file:
            file.write(_digest(content) + content)

    def _identity(self, key: Any) -> bytes:  # noqa: ANN401
        versions = (numba.__version__, llvmlite.__version__)
        return _digest(repr((versions, self._source_stamp, key)).encode())

    def _path(self, key: Any) -> Path:  # noqa: ANN401
        signature, processor, _sources = key
        place = _digest(repr((signature, processor)).encode()).hex()[:16]
        return self._start.with_name(f"{self._start.name}.{place}.nbc")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
