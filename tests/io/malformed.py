"""Malformed TIFF files of every kind that is known to have hurt a reader: `files` yields their names and bytes.

Nothing here uses xrk or tifffile: the files are put together byte by byte, some of them as no writer would.
"""

import struct
import zlib
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

BYTE, ASCII, SHORT, LONG, RATIONAL, SLONG, FLOAT, LONG8 = 1, 2, 3, 4, 5, 9, 11, 16
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
LETTERS = {1: "B", 3: "H", 4: "I", 8: "h", 9: "i", 11: "f", 13: "I", 16: "Q", 18: "Q"}
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, DESCRIPTION = 256, 257, 258, 259, 262, 270
OFFSETS, SAMPLES, ROWS_PER_STRIP, COUNTS, PREDICTOR, FORMAT = 273, 277, 278, 279, 317, 339
TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_COUNTS = 322, 323, 324, 325
SIDE = 32  # of the image that the files are made from: 32 x 32 pixels of 16 bits
PIXELS = bytes(i * i % 251 for i in range(2 * SIDE * SIDE))

Tag = tuple[int, int, int, bytes]  # tag, type, count, values or their offset


class File:
    """A TIFF file under construction: pixels at byte 16, its directory behind them."""

    def __init__(self, order: str = "<", big: bool = False) -> None:
        self.order, self.big = order, big
        self.word = "Q" if big else "I"

    def tag(self, code: int, kind: int, *values: int, count: int | None = None) -> Tag:
        packed = struct.pack(f"{self.order}{len(values)}{LETTERS[kind]}", *values)
        return code, kind, len(values) if count is None else count, packed

    def text(self, code: int, value: bytes, count: int | None = None) -> Tag:
        return code, ASCII, len(value) if count is None else count, value

    def page(self, data: bytes = PIXELS, tile: bool = False, **changes) -> dict[int, Tag]:
        """The tags of a sound page; changes: name=value of a tag of one value."""
        sound = {
            WIDTH: self.tag(WIDTH, LONG, SIDE),
            HEIGHT: self.tag(HEIGHT, LONG, SIDE),
            BITS: self.tag(BITS, SHORT, 16),
            COMPRESSION: self.tag(COMPRESSION, SHORT, 1),
            PHOTOMETRIC: self.tag(PHOTOMETRIC, SHORT, 1),
            SAMPLES: self.tag(SAMPLES, SHORT, 1),
        }
        if tile:
            sound |= {
                TILE_WIDTH: self.tag(TILE_WIDTH, LONG, SIDE),
                TILE_LENGTH: self.tag(TILE_LENGTH, LONG, SIDE),
                TILE_OFFSETS: self.tag(TILE_OFFSETS, LONG, 16),
                TILE_COUNTS: self.tag(TILE_COUNTS, LONG, len(data)),
            }
        else:
            sound |= {
                OFFSETS: self.tag(OFFSETS, LONG, 16),
                ROWS_PER_STRIP: self.tag(ROWS_PER_STRIP, LONG, SIDE),
                COUNTS: self.tag(COUNTS, LONG, len(data)),
            }
        for name, value in changes.items():
            code = globals()[name]
            sound[code] = self.tag(code, LONG8 if value >= 1 << 32 else LONG, value)
        return sound

    def build(self, *pages: dict[int, Tag] | list[Tag], data: bytes = PIXELS, link: int = 0) -> bytes:
        """The file. Values too long for their entries lie behind the directories; `link` follows the last page."""
        data += bytes(-len(data) % 16)
        inline = 8 if self.big else 4
        tables = [list(page.values()) if isinstance(page, dict) else page for page in pages]
        lengths = [(8 if self.big else 2) + len(t) * (20 if self.big else 12) + inline for t in tables]
        starts = [16 + len(data)]
        for length in lengths:
            starts.append(starts[-1] + length)
        behind, directories = b"", []
        for table, (start, following) in zip(tables, pairwise(starts), strict=True):
            directories.append(struct.pack(f"{self.order}{'Q' if self.big else 'H'}", len(table)))
            for code, kind, count, value in table:
                if len(value) > inline:
                    place = starts[-1] + len(behind)
                    behind += value + bytes(len(value) % 2)
                    value = struct.pack(self.order + self.word, place)
                directories.append(struct.pack(f"{self.order}HH{self.word}", code, kind, count))
                directories.append(value.ljust(inline, b"\0"))
            last = start == starts[-2]
            directories.append(struct.pack(self.order + self.word, link if last else following))
        return b"".join([self.header(starts[0]), data, *directories, behind])

    def header(self, first: int) -> bytes:
        mark = b"II" if self.order == "<" else b"MM"
        if self.big:
            return mark + struct.pack(f"{self.order}HHHQ", 43, 8, 0, first)
        return mark + struct.pack(f"{self.order}HI", 42, first) + bytes(8)


def lzw(data: bytes) -> bytes:
    """LZW as TIFF has it, by the textbook."""
    codes, width, table = [(256, 9)], 9, {bytes([i]): i for i in range(256)}
    phrase = b""
    for value in data:
        longer = phrase + bytes([value])
        if longer in table:
            phrase = longer
            continue
        codes.append((table[phrase], width))
        table[longer] = len(table) + 2
        if len(table) + 2 == (1 << width):
            width += 1
        if len(table) + 2 > 4094:
            codes.append((256, 12))
            width, table = 9, {bytes([i]): i for i in range(256)}
        phrase = longer[-1:]
    codes += [(table[phrase], width), (257, width)]
    bits = "".join(f"{code:0{w}b}" for code, w in codes)
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


def packbits(data: bytes) -> bytes:
    return b"".join(bytes([len(data[i : i + 128]) - 1]) + data[i : i + 128] for i in range(0, len(data), 128))


def zstd(data: bytes) -> bytes:
    """A frame of raw blocks (RFC 8878)."""
    blocks = [data[i : i + 65536] for i in range(0, len(data), 65536)]
    heads = [(len(b) << 3 | (i == len(blocks) - 1)).to_bytes(3, "little") for i, b in enumerate(blocks)]
    return b"\x28\xb5\x2f\xfd\x00\x58" + b"".join(h + b for h, b in zip(heads, blocks, strict=True))


@cache
def deflate_bomb(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


@cache
def lzw_bomb(size: int) -> bytes:
    return lzw(bytes(size))


def zstd_bomb(blocks: int) -> bytes:
    """A frame of so many blocks of 128 KiB, four bytes each."""
    block = (1 << 17) << 3 | 0b010
    return (
        b"\x28\xb5\x2f\xfd\x00\x58"
        + (block.to_bytes(3, "little") + b"\0") * (blocks - 1)
        + ((block | 1).to_bytes(3, "little") + b"\0")
    )


CODECS = {5: lzw, 8: zlib.compress, 32946: zlib.compress, 32773: packbits, 50000: zstd}


def files() -> Iterator[tuple[str, bytes]]:
    """Names and bytes, all of them of files that are wrong: classic and little-endian, BigTIFF and big-endian."""
    for big, order in ((False, "<"), (True, ">")):
        f = File(order, big)
        for kind in (_sizes, _tables, _pages, _tags, _mismatches, _codecs, _metadata, _cuts):
            for name, content in kind(f):
                yield f"{'big' if big else 'classic'}-{name}", content


def _sizes(f: File) -> Iterator[tuple[str, bytes]]:
    """Sizes that overflow, or ask for more than there can be."""
    huge = [0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 0x10000, 0x40000001]
    if f.big:
        huge += [2**64 - 1, 2**63, 2**62 + 1, 2**32]
    for width in huge:
        for height in (1, SIDE, *huge[:3], huge[-1]):
            for compression, tile in ((1, False), (8, False), (50000, True), (5, True)):
                page = f.page(tile=tile, WIDTH=width, HEIGHT=height, COMPRESSION=compression)
                if tile:
                    page |= f.page(tile=True, TILE_WIDTH=width, TILE_LENGTH=height)
                    page[WIDTH], page[HEIGHT] = f.page(WIDTH=width)[WIDTH], f.page(HEIGHT=height)[HEIGHT]
                else:
                    page |= {ROWS_PER_STRIP: f.page(ROWS_PER_STRIP=height)[ROWS_PER_STRIP]}
                yield f"size-{width:x}x{height:x}-{compression}", f.build(page)
            yield f"tiles-{width:x}x{height:x}", f.build(f.page(tile=True, TILE_WIDTH=width, TILE_LENGTH=height))
    # Pixels that a small file could only hold if it were a bomb.
    bombs = {8: deflate_bomb(1 << 24), 50000: zstd_bomb(1 << 13), 5: lzw_bomb(1 << 16)}
    for compression, data in bombs.items():
        for side in (1 << 15, 1 << 17):
            for tile in (False, True):
                page = f.page(data, tile, WIDTH=side, HEIGHT=side, COMPRESSION=compression)
                sides = {"TILE_WIDTH": side, "TILE_LENGTH": side} if tile else {"ROWS_PER_STRIP": side}
                page |= {c: t for c, t in f.page(data, tile, **sides).items() if c in (322, 323, 278)}
                yield f"bomb-{compression}-{side}-{tile}", f.build(page, data=data)
    # A sound size, and far more in the stream.
    for compression, data in ((8, deflate_bomb(1 << 26)), (50000, zstd_bomb(1 << 13))):
        yield f"overfull-{compression}", f.build(f.page(data, COMPRESSION=compression), data=data)


def _tables(f: File) -> Iterator[tuple[str, bytes]]:
    """Segments outside the file, wrapping round, or not as many as the size asks for."""
    end = 2**64 if f.big else 2**32
    for offset in (0, 1, 7, 1 << 20, end - 1, end - 8, end // 2, end - len(PIXELS) + 1):
        yield f"offset-{offset:x}", f.build(f.page(OFFSETS=offset))
        yield f"tile-offset-{offset:x}", f.build(f.page(tile=True, TILE_OFFSETS=offset))
    for count in (0, 1, len(PIXELS) - 1, end - 1, end - 16, end - 17, end // 2):
        yield f"count-{count:x}", f.build(f.page(COUNTS=count))
        yield f"tile-count-{count:x}", f.build(f.page(tile=True, TILE_COUNTS=count))
    for number in (0, 2, 3, 33, 65536, (1 << 32) - 1, end // 2, end - 1):
        number = min(number, end - 1)
        for code in (OFFSETS, COUNTS):
            page = f.page()
            page[code] = f.tag(code, LONG, 16, count=number)
            yield f"listed-{code}-{number:x}", f.build(page)
    page = f.page(ROWS_PER_STRIP=1, HEIGHT=1 << 30)
    page[OFFSETS], page[COUNTS] = (f.tag(c, LONG, 16, count=1 << 30) for c in (OFFSETS, COUNTS))
    yield "strips-without-end", f.build(page)


def _pages(f: File) -> Iterator[tuple[str, bytes]]:
    """Directories that loop, overlap, lie outside, or are very many."""
    sound = f.page()
    at = 16 + len(PIXELS)
    for link in (at, at + 1, at + 2, 1, 8, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 20):
        yield f"link-{link:x}", f.build(sound, link=link)
    second = len(f.build(sound))
    yield "loop-of-two", f.build(sound, sound, link=at)
    yield "loop-on-the-second", f.build(sound, sound, link=second)
    yield "loop-of-subifds", f.build(sound | {330: f.tag(330, LONG, at)})
    for first in (0, 1, 7, 15, 1 << 30, (1 << 32) - 1):
        yield f"first-{first:x}", f.header(first) + f.build(sound)[16:]
    reduced = [f.tag(254, LONG, 1)]
    many = f.build(sound, *[reduced] * 20000)
    yield "many-pages", many
    yield "many-pages-and-a-loop", f.build(sound, *[reduced] * 2000, link=at)
    # Directories that share their bytes: each says that it has thousands of entries.
    entries = struct.pack(f.order + ("Q" if f.big else "H"), 3000)
    yield "entries-without-end", f.header(16) + entries * 20
    yield "no-entries", f.header(16) + bytes(64)
    yield "overlapping", f.header(16) + (entries + struct.pack(f.order + f.word, 24)) * 9000


def _tags(f: File) -> Iterator[tuple[str, bytes]]:
    """Tags that are missing, empty, zero, huge, twice there, of a wrong type or with a wrong number of values."""
    for tile in (False, True):
        sound = f.page(tile=tile)
        layout = "tile" if tile else "strip"
        for code in sound:
            others = {c: t for c, t in sound.items() if c != code}
            yield f"{layout}-without-{code}", f.build(others)
            yield f"{layout}-twice-{code}", f.build([*sound.values(), sound[code]])
            yield f"{layout}-empty-{code}", f.build(others | {code: (code, LONG, 0, b"")})
            for value in (0, 0xFFFFFFFF):
                yield f"{layout}-{value:x}-in-{code}", f.build(others | {code: f.tag(code, LONG, value)})
            for kind in (0, 2, 5, 6, 7, 9, 10, 11, 12, 14, 15, 17, 19, 255, 65535):
                yield f"{layout}-type-{kind}-{code}", f.build(others | {code: (code, kind, 1, sound[code][3])})
            for count in (2, 1 << 16, (1 << 32) - 1):
                yield f"{layout}-{count:x}-values-{code}", f.build(others | {code: (code, LONG, count, sound[code][3])})
    for code in (254, 266, 317, 339, 32997, 33629):
        for kind in (0, 2, 9, 65535):
            yield f"type-{kind}-{code}", f.build(f.page() | {code: (code, kind, 1, b"\1\1\1\1")})
        for value in (0, 2, 0xFFFFFFFF):
            yield f"value-{value:x}-{code}", f.build(f.page() | {code: f.tag(code, LONG, value)})


def _mismatches(f: File) -> Iterator[tuple[str, bytes]]:
    """Bits, sample formats, predictors and codecs that do not fit each other."""
    for bits in (0, 1, 3, 7, 9, 10, 12, 14, 15, 24, 33, 48, 63, 64, 128, 255, 65535):
        for sample in (1, 2, 3, 4, 5, 6, 65535):
            for predictor in (1, 2, 3, 34892):
                page = f.page(PREDICTOR=predictor, FORMAT=sample, BITS=bits, COMPRESSION=5)
                yield f"bits-{bits}-format-{sample}-predictor-{predictor}", f.build(page)
    for compression in (0, 2, 3, 4, 6, 7, 9, 34661, 34712, 34887, 34892, 50001, 50002, 65535):
        yield f"compression-{compression}", f.build(f.page(COMPRESSION=compression))
    for samples in (0, 2, 3, 4, 65535):
        yield f"samples-{samples}", f.build(f.page(SAMPLES=samples))
        yield f"colour-{samples}", f.build(f.page(SAMPLES=samples, PHOTOMETRIC=2))


def _codecs(f: File) -> Iterator[tuple[str, bytes]]:
    """Streams that are damaged, cut off, longer or shorter than their pixels, or of another codec."""
    for compression, encode in CODECS.items():
        whole = encode(PIXELS)
        streams = {
            "half": whole[: len(whole) // 2], "one-byte": whole[:1], "cut": whole[:-5], "short": encode(PIXELS[:-2]),
            "long": encode(PIXELS + b"\0\0"), "empty": encode(b"\0"), "noise": PIXELS, "ones": b"\xff" * 500,
            "zeros": bytes(500), "flipped": whole[:40] + bytes([whole[40] ^ 0x55]) + whole[41:],
        }  # fmt: skip
        for name, stream in streams.items():
            for predictor in (1, 2):
                page = f.page(stream, COMPRESSION=compression, PREDICTOR=predictor)
                yield f"codec-{compression}-{name}-{predictor}", f.build(page, data=stream)


def _metadata(f: File) -> Iterator[tuple[str, bytes]]:
    """Sound pixels, and text or private tags that are traps. These files may be taken."""
    yield "text-without-end", f.build(f.page() | {DESCRIPTION: f.text(DESCRIPTION, b"ImageJ=1", count=1 << 31)})
    for frames in (0, 2, 10**9, 10**18):
        text = f"ImageJ=1.54f\nimages={frames}\n".encode()
        yield f"imagej-frames-{frames}", f.build(f.page() | {DESCRIPTION: f.text(DESCRIPTION, text)})
    counts = f.tag(50838, LONG, *[804] * 4000)
    blob = struct.pack(f"{f.order}I", 0x494A494A) + struct.pack(f"{f.order}II", 0x696E666F, 0xFFFFFFFF) * 100
    private = {50838: counts, 50839: (50839, BYTE, len(blob), blob), DESCRIPTION: f.text(DESCRIPTION, b"ImageJ=1.5")}
    yield "imagej-entries", f.build(f.page() | private)
    nested = b"<OME>" * 3000 + b"</OME>" * 3000
    yield "xml-nested", f.build(f.page() | {DESCRIPTION: f.text(DESCRIPTION, nested)})
    entities = b'<!DOCTYPE OME [<!ENTITY a "aaaaaaaaaa">'
    for before, after in pairwise("abcdefghij"):
        entities += f'<!ENTITY {after} "{f"&{before};" * 10}">'.encode()
    entities += b"]><OME>&j;</OME>"
    yield "xml-entities", f.build(f.page() | {DESCRIPTION: f.text(DESCRIPTION, entities)})
    zero = (282, RATIONAL, 1, bytes(8))
    yield "resolution-zero", f.build(f.page() | {282: zero, 283: (283, RATIONAL, 1, bytes(8))})
    yield "json", f.build(f.page() | {DESCRIPTION: f.text(DESCRIPTION, b'{"xrk": ' + b"[" * 50000)})


def _cuts(f: File) -> Iterator[tuple[str, bytes]]:
    """A file that is still being written, or was cut off."""
    whole = f.build(f.page())
    for length in (0, 1, 2, 4, 7, 8, 9, 15, 16, 17, 1000, 16 + len(PIXELS), len(whole) - 20, len(whole) - 1):
        yield f"cut-{length}", whole[:length]
    yield "pixels-not-written", f.build(f.page(), data=b"")
    yield "no-directory-yet", f.header(0) + PIXELS
