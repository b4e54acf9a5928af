"""Damage for files, from a seed: bytes, headers of safetensors, tensors, JSON at any place, lines, archives.

`mutate(content, suffix, rng)` is what a damaged, hand-made or hostile file of the same kind may look like.
"""

import io
import json
import random
import struct
import zipfile
from functools import cache

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "u1", "BF16": "<u2"}
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    2**31,
    -(2**31),
    2**62,
    -(2**63),
    float("nan"),
    float("inf"),
    -float("inf"),
    1e-320,
    1e38,
    1e308,
)
DEEP = 200_000
# Values of JSON as they are written: those that no value in Python stands for, too.
RAW = (
    "null", "true", "false", "-1", "0", "1", "2147483648",
    "2147483647", "2000000000", "9223372036854775808", "1e308", "1e999", "-1e999", "1e-320",
    "NaN", "Infinity", "-Infinity", "9" * 5000, '""', '"\\ud800"', '"\\u0000"', '" "', "[]", "{}", "[[]]", "[null]",
    '{"a": 1, "a": 2}', '["a", "a"]', "0.5", "-0.0", '"x"', '"' + "x" * 10_000 + '"', "[" * DEEP + "]" * DEEP,
    "[" * 90 + "]" * 90,
    '{"a":' * DEEP + "1" + "}" * DEEP, "12345678901234567890", "1.0", "4294967296", "[0, 0]", "[1e999]", '{"": {}}',
)  # fmt: skip


def mutate(content: bytes, suffix: str, rng: random.Random) -> bytes:
    """One to three changes, each fitting the kind of file or to its bytes."""
    fitting = {".safetensors": _safetensors, ".json": _json, ".jsonl": _lines, ".zip": _zip}.get(suffix, _bytes)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            content = (fitting if rng.random() < 0.85 else _bytes)(content, rng)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, struct.error):
            content = _bytes(content, rng)  # an earlier change has left nothing that could be changed so
    return content


def _bytes(content: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 2, 8, 64))
    match rng.randrange(5):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + rng.randbytes(length) + content[at + length :]
        case 2:
            return content[:at] + rng.randbytes(length) + content[at:]
        case 3:
            return content[:at] + content[at + length :]
    return content[:at] + bytes([0xFF if rng.random() < 0.5 else 0]) * length + content[at + length :]


def _json(content: bytes, rng: random.Random) -> bytes:
    return _text(json.loads(content), rng).encode("utf-8", "surrogatepass")


def _text(found, rng: random.Random) -> str:
    """JSON with one place changed: another value, gone, twice, or under another name."""
    places = list(_places(found))
    mark = f"<{rng.getrandbits(64)}>"
    if not places:
        return rng.choice(RAW)
    whole, key = rng.choice(places)
    change = rng.randrange(8)
    if change == 0:
        del whole[key]
    elif change == 1 and isinstance(whole, list):
        whole.extend([whole[key]] * rng.choice((1, 3, 50)))
    elif change == 2 and isinstance(whole, dict):
        whole[rng.choice(("", "x", "layers", "seen", "0", "kind"))] = whole.pop(key)
    elif change == 3:
        _, (other, name) = 0, rng.choice(places)
        whole[key] = json.loads(json.dumps(other[name]))
    elif change == 4 and type(whole[key]) in (int, float):
        whole[key] = rng.choice(
            (whole[key] + 1, whole[key] - 1, -whole[key], whole[key] * 2, whole[key] * 1e30, str(whole[key]))
        )
    else:
        whole[key] = mark
    return json.dumps(found).replace(f'"{mark}"', rng.choice(RAW))


def _places(found):
    if isinstance(found, dict | list):
        for key in list(found) if isinstance(found, dict) else range(len(found)):
            yield found, key
            yield from _places(found[key])


def _lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    match rng.randrange(8):
        case 0:
            lines.insert(at, lines[rng.randrange(len(lines))])
        case 1:
            del lines[at]
        case 2:
            lines[at] = rng.choice(RAW).encode()
        case 3:
            lines[at] = lines[at] + rng.choice((b"\r", b"\x00", b"\xe2\x80\xa8", b" ", b","))
        case _:
            lines[at] = _json(lines[at], rng)
    return b"\n".join(lines)


def _zip(content: bytes, rng: random.Random) -> bytes:
    name = rng.choice(("words/en", "words/en", "words/de", "../en"))
    packed = bytearray(_archive(name, rng.choice(METHODS), rng.choice(WORDS)))
    if rng.random() < 0.5:  # what the archive says of the file: flags, method, sizes
        at = packed.rfind(b"PK\x01\x02") + rng.choice((8, 10, 20, 24, 42))
        packed[at : at + 2] = rng.randbytes(2)
    return bytes(packed)


METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
WORDS = (b"", b"apple pear", b"\xff\xfe", b"word " * 8_000_000, b"Apple\nb\n")


@cache
def _archive(name: str, method: int, words: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if len(words) > 99 else method) as archive:
        archive.writestr(name, words)
    return out.getvalue()


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    tensors = {
        name: [one["dtype"], list(one["shape"]), data[slice(*one["data_offsets"])]]
        for name, one in header.items()
        if name != "__metadata__"
    }
    metadata = header.get("__metadata__", {})
    kind = rng.randrange(10)
    if kind < 3 and metadata.get("headwise"):
        metadata["headwise"] = _text(json.loads(metadata["headwise"]), rng)
    elif kind == 3:
        return _packed_header(_text(header, rng).encode("utf-8", "surrogatepass"), data)
    elif tensors:
        _change_tensors(tensors, rng)
    return packed(tensors, metadata)


def _change_tensors(tensors, rng: random.Random) -> None:
    name = rng.choice(list(tensors))
    dtype, shape, data = tensors[name]
    count = int(np.prod(shape))
    match rng.randrange(8):
        case 0:
            del tensors[name]
        case 1:
            tensors[rng.choice(("x", f"9.{name}", name + "2", name.upper()))] = tensors[name]
        case 2:
            tensors[name] = tensors[rng.choice(list(tensors))]
        case 3:
            new = rng.choice(list(DTYPES))
            tensors[name] = [new, shape, np.ones(count).astype(DTYPES[new]).tobytes()]
        case 4:
            new = list(shape)
            if new:
                at = rng.randrange(len(new))
                new[at] = rng.choice((0, 1, new[at] + 1, max(0, new[at] - 1), 2 * new[at]))
            else:
                new = [1]
            data = (data * 3)[: int(np.prod(new)) * np.dtype(DTYPES[dtype]).itemsize]
            tensors[name] = [dtype, new, data]
        case 5:
            tensors[name] = [dtype, rng.choice((shape[::-1], [count], [1, *shape], [*shape, 1])), data]
        case _ if dtype in DTYPES:
            values = np.frombuffer(data, DTYPES[dtype]).copy()
            if dtype == "BF16":
                values[:] = rng.choice((0x7FC0, 0x7F80, 0x7F7F, 0))
            elif len(values):
                some = [rng.randrange(len(values)) for _ in range(rng.choice((1, 2, len(values))))]
                with np.errstate(all="ignore"):
                    change = rng.choice((*NUMBERS, None, None))
                    new = np.roll(values, 1)[some] if change is None else np.float64(change).astype(values.dtype)
                values[some] = new
            tensors[name] = [dtype, shape, values.tobytes()]


def packed(tensors, metadata) -> bytes:
    """A safetensors file."""
    header, at = {"__metadata__": metadata}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    return _packed_header(json.dumps(header).encode(), b"".join(data for _, _, data in tensors.values()))


def _packed_header(header: bytes, data: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data
