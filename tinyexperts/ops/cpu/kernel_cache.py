"""numba's cache of compiled kernels on disk, which may fail without a kernel failing.

numba (core/caching.py of 0.61 to 0.68) lets every error of reading and writing through to the caller of the kernel: a
full disk, and a damaged entry, at every call. An entry damaged in its middle would reach LLVM, which may abort.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile

_DIGEST_BYTES = hashlib.sha256().digest_size


class KernelCache(FunctionCache):
    """The cache of one kernel: what can't be read is compiled again, and what can't be written gives one warning."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        names = self.cache_path, self._impl.filename_base, self._impl.locator.get_source_stamp()
        self._cache_file = _CheckedFile(*names)  # type: ignore[no-untyped-call]

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return what was compiled for a signature; None if nothing was, or it can't be read."""
        folder = self.cache_path
        try:
            return super().load_overload(signature, target_context)  # type: ignore[no-untyped-call]
        except OSError as error:
            _warn_once(f"compiled kernels in {folder} can't be read ({error.strerror}) and are compiled again")
        except Exception:  # of whatever kind a damaged pickle leads to
            _warn_once(f"a compiled kernel in {folder} is damaged and is compiled again")
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep what was compiled, if that is possible."""
        try:
            try:
                super().save_overload(signature, compiled)  # type: ignore[no-untyped-call]
            except OSError:
                raise
            except Exception:  # a damaged list of entries
                self.flush()  # type: ignore[no-untyped-call]
                super().save_overload(signature, compiled)  # type: ignore[no-untyped-call]
        except Exception as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            _warn_once(f"compiled kernels can't be kept in {self.cache_path} ({why}): each process compiles them again")


@functools.cache
def _warn_once(sentence: str) -> None:
    """Warn once of the same thing, however many kernels meet it."""
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
