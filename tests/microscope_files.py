"""Writers of PNG and TIFF files that PIL cannot write: 16-bit colour, several pages, planes, tiles, float colour."""

import struct
import zlib
from pathlib import Path

import numpy as np


def field(size=(48, 40), seed=0):
    """A bright field with darker discs, uint8 `[H, W, 3]`; its brightest pixels are white."""
    rng = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[:height, :width]
    pixels = np.full((height, width, 3), (230.0, 225.0, 228.0))
    for _ in range(6):
        inside = (x - rng.uniform(0, width)) ** 2 + (y - rng.uniform(0, height)) ** 2 < rng.uniform(3, 8) ** 2
        pixels[inside] = rng.uniform((120, 40, 90), (220, 140, 180))
    pixels[:3, :8] = 255
    return (pixels + rng.normal(0, 2, pixels.shape)).clip(0, 255).round().astype(np.uint8)


def write_png(path: Path, pixels: np.ndarray, significant: int | None = None, transparent=None) -> Path:
    """Pixels uint16 `[H, W]` (gray) or `[H, W, 2|3|4]` (gray and alpha, RGB, RGBA) as a 16-bit PNG.

    Args:
        path (`Path`): The file.
        pixels (`np.ndarray`): What to write.
        significant (`int`, *optional*): Bits in use, as an sBIT chunk.
        transparent (`tuple`, *optional*): The colour that is transparent.
    """

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    height, width, channels = pixels.shape
    content = b"\x89PNG\r\n\x1a\n"
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    content += chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    if significant:
        content += chunk(b"sBIT", bytes([significant] * channels))
    if transparent:
        content += chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    path.write_bytes(content + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def write_tiff(
    path: Path,
    pages,
    photometric: int = 2,
    order: str = "<",
    planar: bool = False,
    tile: int | None = None,
    packed: bool = False,
    description: str = "",
    extra: int | None = None,
    tags: dict | None = None,
) -> Path:
    """Arrays `[H, W]` or `[H, W, C]` as the pages of a TIFF.

    Args:
        path (`Path`): The file.
        pages (`list[np.ndarray]`): The pages.
        photometric (`int`): 0 gray with white as 0, 1 gray, 2 RGB, 5 CMYK.
        order (`str`): `<` or `>`.
        planar (`bool`): Each channel as a plane.
        tile (`int`, *optional*): Edge of tiles; strips of eight rows when missing.
        packed (`bool`): Compressed with Deflate.
        description (`str`): ImageDescription of the first page.
        extra (`int`, *optional*): What the last channel is: 0 unknown, 1 premultiplied alpha, 2 alpha.
        tags (`dict`, *optional*): Further tags of 16-bit numbers.
    """
    out = bytearray((b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 0))
    pointer = 4
    for number, page in enumerate(pages):
        page = page[..., None] if page.ndim == 2 else page
        height, width, channels = page.shape
        step = (tile, tile) if tile else (8, width)
        offsets, sizes = [], []
        for plane in [page[..., band : band + 1] for band in range(channels)] if planar else [page]:
            for top in range(0, height, step[0]):
                for left in range(0, width, step[1]):
                    block = plane[top : top + step[0], left : left + step[1]]
                    if tile:
                        missing = [(0, tile - block.shape[0]), (0, tile - block.shape[1]), (0, 0)]
                        block = np.pad(block, missing)
                    content = block.astype(block.dtype.newbyteorder(order)).tobytes()
                    content = zlib.compress(content) if packed else content
                    offsets.append(len(out))
                    sizes.append(len(content))
                    out += content + b"\0" * (len(content) % 2)
        float_or_not = {"u": 1, "i": 2, "f": 3}[page.dtype.kind]
        entries = {
            256: (4, [width]),
            257: (4, [height]),
            258: (3, [8 * page.itemsize] * channels),
            259: (3, [8 if packed else 1]),
            262: (3, [photometric]),
            277: (3, [channels]),
            284: (3, [2 if planar else 1]),
            339: (3, [float_or_not] * channels),
        }
        if tile:
            entries |= {322: (3, [tile]), 323: (3, [tile]), 324: (4, offsets), 325: (4, sizes)}
        else:
            entries |= {273: (4, offsets), 278: (4, [step[0]]), 279: (4, sizes)}
        if description and not number:
            entries[270] = (2, list(description.encode() + b"\0"))
        if extra is not None:
            entries[338] = (3, [extra])
        entries |= {tag: (3, values) for tag, values in (tags or {}).items()}
        listed = b""
        for tag, (kind, values) in sorted(entries.items()):
            content = struct.pack(f"{order}{len(values)}{ {2: 'B', 3: 'H', 4: 'I'}[kind] }", *values)
            if len(content) > 4:
                out += b"\0" * (len(out) % 2)
                content, place = struct.pack(f"{order}I", len(out)), content
                out += place
            listed += struct.pack(f"{order}HHI", tag, kind, len(values)) + content.ljust(4, b"\0")
        out += b"\0" * (len(out) % 2)
        out[pointer : pointer + 4] = struct.pack(f"{order}I", len(out))
        out += struct.pack(f"{order}H", len(entries)) + listed
        pointer = len(out)
        out += b"\0" * 4
    path.write_bytes(bytes(out))
    return path
