"""Tars from strangers: what tarfile takes on trust is looked at here."""

from __future__ import annotations

import tarfile
from typing import Any, BinaryIO

#: Bytes of a name that has an entry of its own, as long ones have.
NAME_LIMIT = 1024**2
_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


class Source:
    """Forwards, and remembers the storage's own error, which tarfile and pyarrow would turn into a damaged file."""

    def __init__(self, file: BinaryIO):
        self.file, self.error = file, None
        self.ended = 0  # reads that found the end

    def read(self, size: int = -1) -> bytes:
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


class Header(tarfile.TarInfo):
    """A TarInfo whose archive remembers how its list of members ended: tarfile takes a damaged header for the end."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        info = super().frombuf(buf, encoding, errors)
        if info.type in _NAMES and info.size > NAME_LIMIT:  # read into memory whole, unlike a member
            raise tarfile.ReadError(f"a name or header of {info.size} bytes")
        return info

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            archive.ending = error
            raise
