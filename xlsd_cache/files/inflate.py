"""A slice of a file, stored or deflated, as a file object."""

import io
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from xlsd_cache.outcomes import Reason

_FED = 2**15  # bytes that are inflated at once
_RESTARTS = 8  # of inflating, when a reader seeks back; after that, all content is kept

ReadAt = Callable[[int, int], bytes]  # offset, count -> bytes, fewer at the end


class BadSource(OSError):
    """A permanent fault of a source; `reason` is one of outcomes.REASONS.

    The system's errors, which may be temporary, are other OSErrors.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def inflate(data: bytes, size: int) -> bytes:
    """Inflate `data` to `size` bytes. Raises BadSource if it is damaged or of another size."""
    try:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise _damaged(str(error)) from error
    if len(inflated) != size:
        raise _damaged(_other_size(len(inflated), size))
    return inflated


def _other_size(got: int, size: int) -> str:
    return f"it inflates to {f'more than {size}' if got > size else got} bytes and not to {size}"


def _damaged(told: str) -> BadSource:
    return BadSource("corrupt", f"damaged in its archive: {told}")


class FileSlice(io.RawIOBase):
    """`length` bytes at `offset` of an open file, inflated if `inflated` is their inflated size.

    Closing it closes the file.
    """

    def __init__(self, file: IO[bytes], offset: int, length: int, inflated: int | None) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0
        self._size = length if inflated is None else inflated
        self._read: ReadAt = self._stored
        if inflated is not None:
            self._read = _Inflated(self._stored, inflated).read_at

    def _stored(self, offset: int, count: int) -> bytes:
        self._file.seek(self._offset + offset)
        return self._file.read(max(0, min(count, self._length - offset)))

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True, but seeking back in deflated bytes inflates again from the start."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As in io.RawIOBase."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """As in io.RawIOBase. Raises BadSource for damaged deflated bytes."""
        view = memoryview(buffer).cast("B")
        data = self._read(self._at, max(0, min(len(view), self._size - self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Close it and the file."""
        self._file.close()
        super().close()


class _Inflated:
    """Inflates deflated bytes on demand."""

    def __init__(self, read: ReadAt, size: int) -> None:
        self._read, self._size = read, size
        self._restarts, self._whole = 0, b""
        self._restart()

    def _restart(self) -> None:
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._fed = self._out = 0  # bytes read, bytes inflated

    def read_at(self, offset: int, count: int) -> bytes:
        """Inflated bytes from `offset`. Raises BadSource if they are damaged or missing."""
        if offset < self._out and not self._whole:
            self._restart()
            self._restarts += 1
            if self._restarts > _RESTARTS:  # its size is bounded, the number of seeks is not
                self._whole = b"".join(self._pieces(self._size))
        if self._whole:
            return self._whole[offset : offset + count]
        for _ in self._pieces(offset - self._out):
            pass
        return b"".join(self._pieces(count))

    def _pieces(self, count: int) -> Iterator[bytes]:
        """The next `count` bytes, in pieces."""
        while count > 0:
            fed = self._read(self._fed, _FED)
            try:
                piece = self._inflater.decompress(fed, min(count, 8 * _FED))
            except zlib.error as error:
                raise _damaged(str(error)) from error
            self._fed += len(fed) - len(self._inflater.unconsumed_tail)
            self._out += len(piece)
            count -= len(piece)
            if not piece and (self._inflater.eof or not fed):
                raise _damaged(_other_size(self._out, self._size))
            yield piece
