"""Reading of tars of unknown origin: checks of what tarfile takes on trust."""

from __future__ import annotations

import tarfile
from tarfile import HeaderError, TarFile
from typing import Any, BinaryIO

#: Bytes of a name that has an entry of its own, as long ones have.
NAME_LIMIT = 1024**2
_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


class Source:
    """A file that remembers the storage's own error, which tarfile and pyarrow would report as a damaged file."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: Exception | None = None
        self.ended = 0  # reads that found the end

    def read(self, size: int = -1) -> bytes:
        """As a file's. Raises EOFError if a reader keeps asking behind the end."""
        try:
            data = self.file.read(size)
        except Exception as error:
            self.error = error
            raise
        self.ended = 0 if data else self.ended + 1
        if self.ended > 1000:  # tarfile would go on for the 2^60 bytes that a forged size may promise
            raise EOFError("the file ends within a member")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class Archive(TarFile):
    """A tar that remembers in ``ending`` how its list of members ended: tarfile takes a damaged header for the end."""

    ending: HeaderError | None = None


class Header(tarfile.TarInfo):
    """A member of an ``Archive``."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
        """As the base class. Raises ReadError for a name or header that is too long to be read into memory."""
        info = super().frombuf(buf, encoding, errors)
        if info.type in _NAMES and info.size > NAME_LIMIT:  # read into memory whole, unlike a member
            raise tarfile.ReadError(f"a name or header of {info.size} bytes")
        return info

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> Header:
        """As the base class; notes the error that ended the list of members."""
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            if isinstance(tarfile, Archive):
                tarfile.ending = error
            raise
