"""Hypothesis strategies of hostile inputs: bytes, JSON, text, image files, file names, and folders of these."""

import copy
import functools
import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st


# JSON that Python would not write.
RAW_JSON = [
    *("1e400", "-1e400", "9" * 400, "9" * 5000, "1e-300", "NaN", "Infinity", '"\\ud800"', '"\\u0000"', '"\\u001b[2J"'),
    *('"2026-13-45"', '"\\u202egpj"', "[" * 500 + "]" * 500, '{"a": 1, "a": 2}', "[" * 1_000_000, '{"a":' * 1_000_000),
    *('"../../../etc/passwd"', '"C:\\\\a.png"', '"' + "x" * 5000 + '"', '{"size": [4, 5], "counts": [1]}', ""),
]
WORDS = [
    *("nan", "inf", "-1", "1e400", "9" * 400, "9" * 5000, "1_0", "\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT THREE}"),
    *("2026-13-45", "!!python/object:os.system", "&a [*a, *a]", "<<: *x", "? : ?", "%YAML 9", "---\n---", "{" * 3000),
    *("<!DOCTYPE x>", "<a>" * 3000, "]]>", "&amp;&#0;", "encoding='utf-7'", "../x", "/etc/passwd", "x" * 5000, ""),
    *("\x00", '"', "'", ";;;", "\t", "\r\n", "\N{RIGHT-TO-LEFT OVERRIDE}", "\x1b[2J", "=1+1"),
]
texts = st.one_of(
    st.sampled_from(
        ["", "a", "1", "../x", "/etc/passwd", "\x1b[2J", "\ud800", "\n", "hf-hub:x/y", "someone/thing", "a" * 10_000, "a.png"]
    ),
    st.text(max_size=12),
)  # fmt: skip
numbers = st.one_of(
    st.sampled_from(
        [0, -1, 1, 2, 3, 100_000, 10**9, -(10**9), 10**30, 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf")]
    ),
    st.integers(),
    st.floats(),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=6,
)
hostile_values = st.one_of(
    json_values,
    json_values,
    st.sampled_from([{}, [], [[[]]], [None], {"0": "a"}, {"a": {"b": {}}}, {"model_type": "bert"}, {"__class__": "x"}]),
    st.just(functools.reduce(lambda inner, level: [inner] if level % 2 else {"a": inner}, range(50), 0)),
    st.just({str(number): f"name {number}" for number in range(20_000)}),
)


@dataclass(frozen=True, repr=False)
class Change:
    """What became of one file: other content, or something that is no file.

    Args:
        name (`str`): Of the file in its folder.
        what (`str`): For people.
        content (`bytes`, *optional*): What is in it now.
        kind (`str`, *optional*): What is there instead.
    """

    name: str
    what: str
    content: bytes | None = None
    kind: str | None = None

    def __repr__(self) -> str:
        return f"<{self.name}: {self.what}>"


def lay_down(folder: Path, files: Mapping[str, bytes], changes: Sequence[Change] = ()) -> None:
    """Writes files, and does to them what was changed."""
    contents = dict(files) | {change.name: change.content for change in changes if change.kind is None}
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for change in changes:
        if change.kind is not None:
            KINDS[change.kind](folder / change.name)


def _large(path: Path) -> None:
    # Takes no room where files have holes.
    with path.open("r+b") as file:
        file.truncate(600 << 20)


def _replaced(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda path: (path.unlink(), make(path))


KINDS: dict[str, Callable[[Path], Any]] = {
    "gone": Path.unlink,
    "folder": _replaced(Path.mkdir),
    "pipe": _replaced(os.mkfifo),
    "broken link": _replaced(lambda path: path.symlink_to("nowhere")),
    "link to itself": _replaced(lambda path: path.symlink_to(path.name)),
    "link to its folder": _replaced(lambda path: path.symlink_to(path.parent)),
    "link to the root": _replaced(lambda path: path.symlink_to("/")),
    "device": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "no permission": lambda path: path.chmod(0),
    "large": _large,
}


@st.composite
def changed_bytes(draw: Callable, content: bytes, head: int = 400) -> tuple[str, bytes]:
    """Content with bytes changed, cut, put in or doubled; half of the places are among its first `head`."""
    way = draw(st.sampled_from(["changed", "cut", "put in", "left out", "doubled", "noise", "empty", "UTF-16"]))
    at = draw(st.one_of(st.integers(0, min(head, len(content))), st.integers(0, len(content))))
    if way == "changed":
        count = draw(st.sampled_from([1, 1, 2, 4, 8]))
        return f"changed at {at}", content[:at] + draw(st.binary(min_size=count, max_size=count)) + content[
            at + count :
        ]
    if way == "cut":
        return f"cut at {at}", content[:at]
    if way == "put in":
        piece = draw(st.binary(min_size=1, max_size=16)) * draw(st.sampled_from([1, 1, 50, 1000]))
        return f"{len(piece)} bytes put in at {at}", content[:at] + piece + content[at:]
    if way == "left out":
        return f"left out at {at}", content[:at] + content[at + draw(st.sampled_from([1, 8, 1000])) :]
    if way == "doubled":
        return f"doubled from {at}", content + content[at:]
    if way == "noise":
        piece = draw(st.binary(max_size=64)) * draw(st.sampled_from([1, 20, 500]))
        return f"{len(piece)} bytes of noise", piece
    return way, b"" if way == "empty" else content.decode("utf-8", "replace").encode("utf-16")


@st.composite
def changed_words(draw: Callable, content: bytes) -> tuple[str, bytes]:
    """Text with a word replaced, or one put in."""
    text = content.decode("utf-8", "replace")
    ends = [-1, *(index for index, character in enumerate(text) if not character.isalnum())]
    start = draw(st.sampled_from(ends)) + 1
    end = next((index for index in ends if index >= start), len(text)) if draw(st.booleans()) else start
    word = draw(st.one_of(st.sampled_from(WORDS), texts))
    return f"{word[:30]!r} at {start}", (text[:start] + word + text[end:]).encode("utf-8", "surrogatepass")


@st.composite
def changed_json(draw: Callable, content: bytes, hostile: st.SearchStrategy = hostile_values) -> tuple[str, bytes]:
    """JSON, or a line of JSON lines, with a few values somewhere in it replaced, taken out, doubled, renamed or moved."""
    text = content.decode()
    try:
        lines, value = [""], json.loads(text)
        chosen = 0
    except ValueError:
        lines = text.splitlines()
        chosen = draw(st.integers(0, len(lines) - 1))
        value = json.loads(lines[chosen])
    done, raw = [], draw(st.sampled_from(RAW_JSON))
    holder: Any = {"": value}
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        done.append(_change_value(draw, holder, hostile))
    changed = json.dumps(holder.get("", None)).replace('"@raw@"', raw)
    lines[chosen] = changed
    what = ", ".join(done).replace("'@raw@'", raw[:30])
    return what, "\n".join(lines).encode()


def is_json(changed: tuple[str, bytes]) -> bool:
    """Whether Python's own reader takes it, and finds an object."""
    try:
        return isinstance(json.loads(changed[1]), dict)
    except (ValueError, RecursionError):
        return False


def _change_value(draw: Callable, holder: Any, hostile: st.SearchStrategy) -> str:
    key, path = "", []
    if not holder:
        return "nothing"
    while True:
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or draw(st.integers(0, 3)) == 0:
            break
        holder, key = inner, draw(st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner))))
        path.append(str(key)[:40])
    old, at = holder[key], ".".join(path)
    ways = ["hostile", "hostile", "raw"]
    if path:
        ways += ["taken out", "moved"] + (["doubled"] if isinstance(holder, list) else ["renamed"])
    if isinstance(old, (int, float)) and not isinstance(old, bool) and abs(old) < 1e300:
        ways += ["number", "number"]
    way = draw(st.sampled_from(ways))
    if way == "hostile":
        # Or a later change would change the strategy's own.
        holder[key] = copy.deepcopy(draw(hostile))
        return f"{at}: {str(holder[key])[:60]!r}"
    if way == "raw":
        holder[key] = "@raw@"
        return f"{at}: '@raw@'"
    if way == "number":
        factor = draw(st.sampled_from([-1, 0, 2, 1000, 1 / 3, 1.5]))
        holder[key] = old * factor if factor else old + draw(st.sampled_from([1, -1]))
        return f"{at}: {old} -> {holder[key]}"
    if way == "taken out":
        del holder[key]
    elif way == "doubled":
        holder.extend([old] * draw(st.sampled_from([1, 50])))
    elif way == "renamed":
        holder[draw(st.one_of(st.just(f"{key}x"), st.sampled_from(["model_type", "auto_map", "dtype"]), texts))] = (
            holder.pop(key)
        )
    else:
        holder[key] = holder[draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))]
    return f"{at}: {way}"


@st.composite
def changed_safetensors(draw: Callable, content: bytes) -> tuple[str, bytes]:
    """Weights with their header changed."""
    (length,) = struct.unpack("<Q", content[:8])
    what, text = draw(changed_json(content[8 : 8 + length]))
    return what, struct.pack("<Q", len(text)) + text + content[8 + length :]


# Images


@st.composite
def changed_png(draw: Callable, content: bytes) -> tuple[str, bytes]:
    """A PNG with chunks changed, taken out, doubled or put in, whose checksums are right."""
    chunks, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    chosen = draw(st.integers(0, len(chunks) - 1))
    kind, data = chunks[chosen]
    ways = ["taken out", "doubled", "data", "kind", "put in", *(["head", "head"] if kind == b"IHDR" else [])]
    way = draw(st.sampled_from(ways))
    if way == "head":
        sides = draw(st.tuples(*[st.sampled_from([0, 1, 7, 30_000, 100_000, 2**31 - 1, 2**32 - 1])] * 2))
        data = struct.pack(">II", *sides) + data[8:]
        if draw(st.booleans()):
            data = (
                data[:8]
                + bytes(draw(st.sampled_from([(8, 2), (16, 6), (16, 4), (1, 0), (3, 3), (8, 3), (255, 255)])))
                + data[10:]
            )
        chunks[chosen] = (kind, data)
    elif way == "taken out":
        del chunks[chosen]
    elif way == "doubled":
        chunks.insert(chosen, chunks[chosen])
    elif way == "data":
        inflated = kind == b"IDAT" and draw(st.booleans())
        data = draw(changed_bytes(zlib.decompress(data) if inflated else data))[1]
        chunks[chosen] = (kind, zlib.compress(data) if inflated else data)
    else:
        kinds = b"tEXt zTXt iTXt iCCP eXIf sBIT tRNS PLTE gAMA acTL fcTL fdAT IDAT IEND abcd".split()
        new = draw(st.sampled_from(kinds))
        if way == "kind":
            chunks[chosen] = (new, data)
        else:
            bomb = b"a\0\0" + zlib.compress(bytes(50_000_000))
            chunks.insert(chosen, (new, draw(st.one_of(st.binary(max_size=40), st.just(bomb)))))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return f"{way} of chunk {chosen}, {kind.decode('latin-1')}", content[:8] + body


@st.composite
def changed_tiff(draw: Callable, content: bytes) -> tuple[str, bytes]:
    """A TIFF with an entry of its directory changed."""
    order = "<" if content[:2] == b"II" else ">"
    (start,) = struct.unpack(f"{order}I", content[4:8])
    (count,) = struct.unpack(f"{order}H", content[start : start + 2])
    at = start + 2 + 12 * draw(st.integers(0, count - 1))
    tag, kind, number, value = struct.unpack(f"{order}HHII", content[at : at + 12])
    part = draw(st.sampled_from(["tag", "kind", "number", "value", "value", "value"]))
    whole = st.one_of(
        st.sampled_from([0, 1, 2, 3, 4, 5, 8, 16, 17, 32, 34712, 65535, 30_000, 2**31 - 1, 2**32 - 1]),
        st.integers(0, 2**32 - 1),
    )
    if part == "tag":
        entry = (
            draw(st.one_of(st.integers(254, 350), st.sampled_from([700, 34665, 34675, 33723, 0, 65535]))),
            kind,
            number,
            value,
        )
    elif part == "kind":
        entry = (tag, draw(st.integers(0, 20)), number, value)
    elif part == "number":
        entry = (tag, kind, draw(whole), value)
    else:
        entry = (tag, kind, number, draw(whole))
    what = f"tag {tag}: {part} of {(tag, kind, number, value)} -> {entry}"
    return what, content[:at] + struct.pack(f"{order}HHII", *entry) + content[at + 12 :]


@st.composite
def changed_image(draw: Callable, content: bytes) -> tuple[str, bytes]:
    """An image file that is damaged where its format has its structure, or anywhere."""
    ways = [changed_bytes, changed_bytes]
    if content.startswith(b"\x89PNG"):
        ways += [changed_png] * 6
    elif content[:4] in (b"II*\0", b"MM\0*"):
        ways += [changed_tiff] * 6
    return draw(draw(st.sampled_from(ways))(content))


def image_files(folder: Path) -> dict[str, bytes]:
    """Good files of every format that is read, by name."""
    from microscope_files import field, write_png, write_tiff
    from PIL import Image

    pixels = field((40, 32))
    deep = pixels.astype(np.uint16) * 257
    picture = Image.fromarray(pixels)
    files: dict[str, bytes] = {}

    def add(name: str, image: Image.Image, **options: Any) -> None:
        buffer = BytesIO()
        image.save(
            buffer,
            name.rpartition(".")[2].replace("jp2", "JPEG2000").replace("jpg", "JPEG").replace("tif", "TIFF"),
            **options,
        )
        files[name] = buffer.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("png", "jpg", "tif", "bmp", "webp", "gif", "ppm", "jp2"):
        add(f"rgb.{kind}", picture)
    add("turned.jpg", picture, exif=exif, icc_profile=b"icc" * 100)
    add("progressive.jpg", picture, progressive=True, quality=60)
    add("cmyk.jpg", picture.convert("CMYK"))
    add("palette.png", picture.convert("P"), transparency=3)
    add("alpha.png", picture.convert("RGBA"))
    add("one.png", picture.convert("1"))
    add("frames.gif", picture.convert("P"), save_all=True, append_images=[picture.convert("P").rotate(90)])
    add("frames.webp", picture, save_all=True, append_images=[picture.rotate(90)])
    add("lab.tif", picture.convert("LAB"))
    for packing in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4"):
        add(f"{packing}.tif", picture.convert("1") if packing == "group4" else picture, compression=packing)
    write_png(folder / "deep.png", deep, significant=12)
    write_png(folder / "gray_alpha.png", deep[..., :2])
    write_tiff(folder / "deep.tif", [deep])
    write_tiff(folder / "planar.tif", [deep], planar=True, order=">")
    write_tiff(folder / "channels.tif", [deep[..., band] for band in range(3)], photometric=1)
    write_tiff(folder / "white_is_zero.tif", [deep[..., 0]], photometric=0)
    write_tiff(folder / "float.tif", [pixels[..., 0].astype(np.float32) / 255], photometric=1)
    write_tiff(folder / "tiled.tif", [deep], tile=16, packed=True)
    ome = (
        '<OME><Image><Pixels DimensionOrder="XYCZT" SizeC="1" SizeZ="3" SizeT="1" SignificantBits="12"/></Image></OME>'
    )
    write_tiff(folder / "stack.tif", [deep[..., 0] >> 4] * 3, photometric=1, description=ome)
    return files | {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Names of files


STARTS = [
    *("", "=", "+", "-", "@", ".", "..", "...", "\t", "\r", "\n", " ", "\uff1d", "'", '"', "\u202e", "\x1b[31m", "-rf"),
    *("CON", "~", "$HOME", "%s", "{0}", "*", "[a]", "a" * 251, "ü" * 125),
]


@st.composite
def file_names(draw: Callable) -> str:
    """Names that a file system takes, of at most 255 bytes and ending like an image; some are not UTF-8."""
    middle = draw(st.one_of(st.text(max_size=8), st.binary(max_size=8).map(os.fsdecode)))
    suffix = draw(st.sampled_from([".png", ".PNG", ".tif", ".jpg"]))
    name = (draw(st.sampled_from(STARTS)) + middle).replace("/", "_").replace("\0", "_")
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        # A surrogate that stands for no byte has no place in a name; its own bytes, which are no UTF-8, have.
        encoded = name.encode("utf-8", "surrogatepass")
    return os.fsdecode(encoded[: 255 - len(suffix)]) + suffix


def changed_file(content: bytes, name: str) -> st.SearchStrategy:
    """A file's content changed as befits what its name says it is."""
    suffix = Path(name).suffix
    if suffix in (".json", ".jsonl"):
        ways = [changed_json] * 8 + [changed_words] + [changed_bytes]
    elif suffix == ".safetensors":
        ways = [changed_safetensors] * 3 + [changed_bytes]
    elif suffix == ".parquet":
        ways = [changed_parquet] * 3 + [changed_bytes]
    elif suffix in (".png", ".jpg", ".bmp", ".tif"):
        ways = [changed_image] * 3 + [changed_bytes]
    else:
        ways = [changed_words] * 4 + [changed_bytes]
    return st.sampled_from(ways).flatmap(lambda way: way(content))


@st.composite
def changed_parquet(draw: Callable, content: bytes) -> tuple[str, bytes]:
    """A table with a column taken out, renamed or of other values, or with other rows."""
    import pyarrow
    import pyarrow.parquet as parquet

    table = parquet.read_table(BytesIO(content))
    name = draw(st.sampled_from(table.column_names))
    at, number = table.column_names.index(name), table.num_rows
    way = draw(st.sampled_from(["taken out", "other values", "fewer rows", "other rows", "renamed", "doubled"]))
    if way == "taken out":
        table = table.remove_column(at)
    elif way == "other values":
        odd = [None, 1.5, "x", b"x", [1], {"bytes": 3}, {"bytes": b"x", "path": "../x"}, "[1]", '[{"file_name": 3}]']
        table = table.set_column(at, name, [[draw(st.sampled_from(odd))] * number])
    elif way == "fewer rows":
        table = table.slice(0, draw(st.integers(0, number)))
    elif way == "other rows" and "rows" in table.column_names:
        texts = [draw(changed_json(text.encode()))[1].decode() for text in table["rows"].to_pylist()]
        table = table.set_column(table.column_names.index("rows"), "rows", [pyarrow.array(texts)])
    elif way == "renamed":
        table = table.rename_columns([f"{column}x" if column == name else column for column in table.column_names])
    else:
        table = pyarrow.concat_tables([table, table])
    buffer = BytesIO()
    parquet.write_table(table, buffer, row_group_size=draw(st.sampled_from([1, 100])))
    return f"{name} {way}", buffer.getvalue()


@st.composite
def changed_folder(
    draw: Callable,
    files: Mapping[str, bytes],
    weights: Mapping[str, int] | None = None,
    kinds: Sequence[str] = tuple(KINDS),
) -> tuple[Change, ...]:
    """A few changes of a folder's files.

    Args:
        draw (`Callable`): Of Hypothesis.
        files (`Mapping[str, bytes]`): What is in the folder.
        weights (`Mapping[str, int]`, *optional*): How often each file is chosen; all alike by default.
        kinds (`Sequence[str]`): What may be there instead of a file.
    """
    names = [name for name in files for _ in range((weights or {}).get(name, 0 if weights else 1))]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    changes = []
    for name in chosen:
        way = draw(st.integers(0, 9))
        if way == 0 and kinds:
            kind = draw(st.sampled_from(kinds))
            changes.append(Change(name, kind, kind=kind))
        elif way == 1 and len(files) > 1:
            other = draw(st.sampled_from([each for each in files if each != name]))
            changes.append(Change(name, f"now {other}", files[other]))
        else:
            what, content = draw(changed_file(files[name], name))
            changes.append(Change(name, what, content))
    return tuple(changes)
