"""numba's cache of compiled kernels on disk, which may fail without a kernel failing.

numba (core/caching.py of 0.61 to 0.68) lets every error of reading and writing through to whoever calls the kernel: a
full disk, and for good an entry that is damaged. One damaged in the middle it would hand to LLVM, which may abort.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from pathlib import Path
from typing import Any

from numba.core.caching import IndexDataCacheFile

_DIGEST_BYTES = hashlib.sha256().digest_size


class KernelCache:
    """The cache of one kernel: what can't be read is compiled again, and what can't be written gives one warning."""

    def __init__(self, cache: Any) -> None:
        file = cache._cache_file
        names = cache.cache_path, cache._impl.filename_base, file._source_stamp
        cache._cache_file = _CheckedFile(*names)  # type: ignore[no-untyped-call]
        self._cache = cache

    @property
    def cache_path(self) -> str:
        """The folder."""
        return str(self._cache.cache_path)

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return what was compiled for a signature; None if nothing was, or it can't be read."""
        try:
            return self._cache.load_overload(signature, target_context)
        except OSError as error:
            _warn_once(f"compiled kernels in {self.cache_path} can't be read ({error.strerror}) and are compiled anew")
        except Exception:  # of whatever kind a damaged pickle leads to
            _warn_once(f"a compiled kernel in {self.cache_path} is damaged and is compiled anew")
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep what was compiled, if that is possible."""
        try:
            try:
                self._cache.save_overload(signature, compiled)
            except OSError:
                raise
            except Exception:  # a damaged list of entries
                self._cache.flush()
                self._cache.save_overload(signature, compiled)
        except Exception as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            _warn_once(f"compiled kernels can't be kept in {self.cache_path} ({why}): each process compiles them anew")

    def enable(self) -> None:
        """Use the cache."""
        self._cache.enable()

    def disable(self) -> None:
        """Don't use the cache."""
        self._cache.disable()

    def flush(self) -> None:
        """Remove all entries."""
        self._cache.flush()


@functools.cache
def _warn_once(sentence: str) -> None:
    """Warn of the same thing once, however many kernels meet it."""
    warnings.warn(sentence, stacklevel=2)


class _CheckedFile(IndexDataCacheFile):
    """Entries end in a digest, which reading a pickle passes over."""

    def _dump(self, content: Any) -> bytes:
        data: bytes = super()._dump(content)  # type: ignore[no-untyped-call]
        return data + hashlib.sha256(data).digest()

    def _load_data(self, name: str) -> Any:
        data = Path(self._data_path(name)).read_bytes()  # type: ignore[no-untyped-call]
        if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
            raise ValueError(f"{name} is not what was written")
        return super()._load_data(name)  # type: ignore[no-untyped-call]
