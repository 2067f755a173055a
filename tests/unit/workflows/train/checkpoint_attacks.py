"""Checkpoints that are not what they claim: a small real one, and what can be done to any place in it."""

import copy
import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import torch

HUGE = 10**5000
ODD_VALUES = {
    "none": None,
    "true": True,
    "negative": -1,
    "infinite": float("inf"),
    "not a number": float("nan"),
    "fraction": 0.5,
    "beyond 64 bits": 2**70,
    "five thousand digits": HUGE,
    "text": "rubbish\n\x1b[31m",
    "bytes": b"rubbish",
    "empty list": [],
    "list": [1, 2, 3],
    "tuple": (0.9, torch.ones(3)),
    "empty dictionary": {},
    "dictionary": {"rubbish": 1, 7: 2},
    "scalar": torch.tensor(7.0),
    "scalar not a number": torch.tensor(float("nan")),
    "another shape": torch.zeros(2, 3, 4, 5),
    "another type": torch.zeros(5056, dtype=torch.float64),
    "empty tensor": torch.zeros(0),
    "without numbers": torch.zeros(3, device="meta"),
    "sparse": torch.eye(3).to_sparse(),
    "parameter": torch.nn.Parameter(torch.zeros(3)),
    "size": torch.Size([1, 2]),
    "device": torch.device("cpu"),
}
"""Values that a checkpoint can hold, one of which may stand in the place of any other."""


def places(content, path=()):
    """Yields the path of every value in nested dictionaries and lists, the containers included."""
    yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places(value, (*path, key))
    elif isinstance(content, list | tuple):
        for key, value in enumerate(content):
            yield from places(value, (*path, key))


def value_at(content, path):
    for key in path:
        content = content[key]
    return content


def replaced(content, path, value):
    """Returns the content with another value at a path; only the containers on the way are copied."""
    if not path:
        return value
    key, *rest = path
    new = copy.copy(content) if not isinstance(content, tuple) else list(content)
    new[key] = replaced(content[key], rest, value)
    return tuple(new) if isinstance(content, tuple) else new


def without(content, path):
    *outer, key = path
    container = copy.copy(value_at(content, outer))
    del container[key]
    return replaced(content, outer, container)


def like(tensor):
    """Yields tensors that differ from one in a single respect, with a word for it."""
    if tensor.is_floating_point():
        for number in (float("nan"), float("inf"), -float("inf")):
            spoilt = tensor.clone()
            spoilt.view(-1)[-1] = number
            yield f"one {number}", spoilt
    yield "double", tensor.double() if tensor.dtype != torch.float64 else tensor.float()
    yield "one row more", torch.cat([tensor.view(-1), tensor.view(-1)[:1]])
    yield "flat", tensor.reshape(1, -1)
    if tensor.numel() > 1:
        yield "one number for all", tensor.view(-1)[:1].expand(tensor.numel()).view(tensor.shape)


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def repacked(data, *, compression=zipfile.ZIP_STORED, change=lambda name, content: content):
    """Returns the bytes of an archive with its members packed and changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return out.getvalue()


class Command:
    """A pickle that runs a command."""

    def __reduce__(self):
        return __import__("os").system, ("touch protlm-was-here",)


def with_pickle(data, content):
    return repacked(data, change=lambda name, old: content if name.endswith("data.pkl") else old)


def files(content):
    """Yields bytes that are no checkpoint, with a word for them."""
    data = saved(content)
    yield "empty", b""
    yield "text", b"no checkpoint"
    for place in (1, 2, 3, 4, 5, 6, 7):
        yield f"cut off at {place}/8", data[: len(data) * place // 8]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
    for member in members[:: len(members) // 12]:
        flipped = bytearray(data)
        start = member.header_offset + 30 + sum(struct.unpack_from("<HH", data, member.header_offset + 26))
        flipped[start + member.file_size // 2] ^= 1
        yield f"a bit flipped in {member.filename}", bytes(flipped)
    for size in (1, 22, 100):
        yield f"{size} bytes short", data[:-size]
    yield "compressed", repacked(data, compression=zipfile.ZIP_DEFLATED)
    damaged = bytearray(repacked(data, compression=zipfile.ZIP_DEFLATED))
    damaged[200:240] = bytes(40)
    yield "a damaged deflated member", bytes(damaged)
    yield "packed with bzip2", repacked(data, compression=zipfile.ZIP_BZIP2)
    yield "packed with lzma", repacked(data, compression=zipfile.ZIP_LZMA)
    for method in (9, 12, 99):
        yield (
            f"packed by method {method}",
            data.replace(
                b"PK\x01\x02" + data[data.index(b"PK\x01\x02") + 4 :][:6] + b"\0\0",
                b"PK\x01\x02" + data[data.index(b"PK\x01\x02") + 4 :][:6] + struct.pack("<H", method),
            ),
        )
    directory = data.index(b"PK\x01\x02")
    encrypted = bytearray(data)
    encrypted[directory + 8] |= 1
    yield "encrypted", bytes(encrypted)
    far = bytearray(data)
    far[directory + 42 : directory + 46] = b"\xff\xff\xff\x7f"
    yield "a member beyond the end", bytes(far)
    long = bytearray(data)
    long[directory + 20 : directory + 28] = b"\xff\xff\xff\x7f" * 2
    yield "a member of 2 GiB", bytes(long)
    yield "no pickle", with_pickle(data, b"")
    yield "half a pickle", with_pickle(data, pickle.dumps({"a": 1}, 2)[:-3])
    yield "a command", with_pickle(data, pickle.dumps(Command(), 2))
    yield "a pickle that is another protocol", with_pickle(data, pickle.dumps({"a": 1}, 5))
    yield "deep brackets", with_pickle(data, b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".")
    digits = b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6
    yield "a number of many digits", with_pickle(data, b"\x80\x02" + digits + b".")
    yield "a list", saved([1, 2, 3])
    yield "a tensor", saved(torch.zeros(3))
    yield "an empty dictionary", saved({})
    yield "counted words", saved(OrderedDict(a=1))
    itself = {}
    itself.update(dict.fromkeys(content, itself))
    yield "a dictionary that holds itself", saved(itself)
    yield "a numpy array", pickle.dumps([1.0])
    yield "a tensor of old", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    yield "a script", repacked(data, change=lambda name, old: old) + b"PK\x05\x06" + bytes(18)
