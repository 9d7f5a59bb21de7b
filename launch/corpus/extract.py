"""Rebuild austen.jsonl.xz from Debian's r-cran-janeaustenr; nothing else needs this file.

    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb deb
    python launch/corpus/extract.py deb/usr/lib/R/site-library/janeaustenr/data/Rdata

R keeps lazily loaded data in NAME.rdb (compressed blocks) and NAME.rdx (an index of them). Both use R's XDR
serialisation; this reads the few types that occur in lists of strings.
"""

import bz2
import json
import lzma
import struct
import sys
import zlib
from pathlib import Path

WORKS = {  # R variable -> title, in order of publication
    "sensesensibility": "Sense and Sensibility",
    "prideprejudice": "Pride and Prejudice",
    "mansfieldpark": "Mansfield Park",
    "emma": "Emma",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
}
# Raw LZMA2 with default options: what R's type "Z" blocks hold.
XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


class Reader:
    """Reads one serialised R value: integers, strings, vectors, pairlists, symbols."""

    def __init__(self, data: bytes):
        self.data, self.position, self.symbols = data, 0, []
        if self._take(2) != b"X\n":
            raise ValueError("not an R serialisation in XDR format")
        version = self._int()
        self._take(8)  # R versions of the writer and of the oldest reader
        if version == 3:
            self._take(self._int())  # name of the native encoding

    def _take(self, count: int) -> bytes:
        self.position += count
        return self.data[self.position - count : self.position]

    def _int(self) -> int:
        return struct.unpack(">i", self._take(4))[0]

    def value(self):
        """Next value. Attributes are read and dropped, except that named vectors come back as dicts."""
        flags = self._int()
        kind, has_attributes, has_tag = flags & 255, flags & 512, flags & 1024
        if kind in (254, 242):  # NULL, empty environment
            return None
        if kind == 255:  # reference to an earlier symbol
            return self.symbols[(flags >> 8) - 1]
        if kind == 1:
            self.symbols.append(self.value())
            return self.symbols[-1]
        if kind == 9:
            length = self._int()
            return None if length < 0 else self._take(length).decode("utf-8")
        if kind == 2:
            return self._pairlist(has_attributes, has_tag)
        vector = self._vector(kind)
        attributes = self.value() if has_attributes else {}
        return dict(zip(attributes["names"], vector, strict=True)) if "names" in attributes else vector

    def _pairlist(self, has_attributes: int, has_tag: int) -> dict:
        if has_attributes:
            self.value()
        tag = self.value() if has_tag else None
        head = self.value()
        return {tag: head, **(self.value() or {})}

    def _vector(self, kind: int) -> list:
        length = self._int()
        if kind in (10, 13):  # logical, integer
            return list(struct.unpack(f">{length}i", self._take(4 * length)))
        if kind in (16, 19):  # strings, generic list
            return [self.value() for _ in range(length)]
        raise ValueError(f"R type {kind} does not occur in this package")


def block(rdb: bytes, offset: int, length: int) -> bytes:
    """Decompressed block of a .rdb file: 4 bytes of size, optionally a letter for the method, then the data."""
    body = rdb[offset + 4 : offset + length]
    if body[:1] == b"Z":
        return lzma.decompress(body[1:], lzma.FORMAT_RAW, filters=XZ_FILTERS)
    return bz2.decompress(body[1:]) if body[:1] == b"2" else zlib.decompress(body)


def main(stem: str) -> None:
    """Write the six novels, one JSON object {"title", "text"} a line, beside this script."""
    rdb = Path(stem + ".rdb").read_bytes()
    index = Reader(zlib.decompress(Path(stem + ".rdx").read_bytes(), 31)).value()["variables"]
    lines = []
    for name, title in WORKS.items():
        text = "\n".join(Reader(block(rdb, *index[name])).value())
        lines.append(json.dumps({"title": title, "text": text}, ensure_ascii=False))
    target = Path(__file__).with_name("austen.jsonl.xz")
    target.write_bytes(lzma.compress(("\n".join(lines) + "\n").encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
