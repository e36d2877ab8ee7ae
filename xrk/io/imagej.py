"""ImageJ's own metadata in a TIFF file: the tags IJMetadataByteCounts (50838) and IJMetadata (50839).

Written from the layout that ij.io.TiffEncoder.writeMetaData and ij.io.TiffDecoder.getMetaData agree on: a header
that names each kind of entry and how many there are of it, then all entries; the first tag holds the lengths of the
header and of every entry. Text is UTF-16 in the file's byte order.
"""

import re
import struct

__all__ = ["COUNTS", "METADATA", "declared_frames", "get_info", "read", "set_info", "write"]

COUNTS, METADATA = 50838, 50839
MAGIC = 0x494A494A  # "IJIJ"
Entries = list[tuple[bytes, bytes]]  # (kind, value), the kind as four letters, such as b"info"


def read(counts: tuple[int, ...], data: bytes, order: str) -> Entries:
    """Entries of the two tags; `order` is "<" or ">". ValueError where they are damaged."""
    if len(counts) < 2 or counts[0] % 8 != 4 or sum(counts) > len(data):
        raise ValueError("IJMetadata does not have the lengths it states")
    kinds: list[bytes] = []
    for start in range(4, counts[0], 8):
        code, number = struct.unpack_from(f"{order}II", data, start)
        kinds += [struct.pack(">I", code)] * min(number, len(counts))
        if len(kinds) >= len(counts):
            break
    if len(kinds) != len(counts) - 1 or struct.unpack_from(f"{order}I", data)[0] != MAGIC:
        raise ValueError("IJMetadata has a header that does not fit its entries")
    entries, start = [], counts[0]
    for kind, size in zip(kinds, counts[1:], strict=True):
        entries.append((kind, data[start : start + size]))
        start += size
    return entries


def write(entries: Entries, order: str) -> tuple[tuple[int, ...], bytes]:
    """Values of the two tags: the lengths, and the bytes."""
    groups: dict[bytes, list[bytes]] = {}
    for kind, value in entries:
        groups.setdefault(kind, []).append(value)
    header = struct.pack(f"{order}I", MAGIC)
    for kind, values in groups.items():
        header += struct.pack(f"{order}II", *struct.unpack(">I", kind), len(values))
    ordered = [value for values in groups.values() for value in values]
    return (len(header), *map(len, ordered)), header + b"".join(ordered)


def get_info(entries: Entries, order: str) -> str:
    """The Info property; empty where there is none."""
    codec = "utf-16-le" if order == "<" else "utf-16-be"
    return next((value.decode(codec, "replace") for kind, value in entries if kind == b"info"), "")


def set_info(entries: Entries, info: str, order: str) -> Entries:
    """The entries with this Info property in the place of another."""
    codec = "utf-16-le" if order == "<" else "utf-16-be"
    return [(b"info", info.encode(codec, "replace")), *(entry for entry in entries if entry[0] != b"info")]


def declared_frames(description: bytes) -> int:
    """Number of frames that an ImageJ description states (its line ``images=``); 1 where it has none."""
    for line in description.splitlines():
        match = re.fullmatch(rb"images=([0-9]{1,10})\s*", line)
        if match:
            return max(1, int(match[1]))
    return 1
