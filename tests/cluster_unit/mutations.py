"""Broken messages made from good ones: bytes turned, cut, repeated and spliced, and JSON values swapped for others."""

import copy
import json
import random
from typing import Any

ODD_BYTES = (
    b"\x00",
    b"\xff",
    b"\x80",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"\xf0\x9f\x90\x9f",
    b"\xff" * 10,
    b"\x0b" * 200,
    b'"',
    b"{",
    b"[",
    b"\\u0000",
)
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    -(2**64),
    10**400,
    1e308,
    -0.0,
    "",
    "x" * 3000,
    "\ud800",
    "\x00",
    "你好",
    [],
    {},
    [[]],
    [None],
    [2**40],
    [-1],
    {"": {}},
    [{"role": "user"}],
    {"type": "json_schema"},
    {"type": "function", "function": {"name": "f"}},
)


def broken_bytes(good: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """One to four changes to a serialised message."""
    data = bytearray(good)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data) + 1)
        match draw.randrange(7):
            case 0:
                data[place:place] = draw.randbytes(draw.randint(1, 8))
            case 1:
                del data[place : place + draw.randint(1, 12)]
            case 2 if place < len(data):
                data[place] ^= 1 << draw.randrange(8)
            case 3:
                data[place:place] = draw.choice(ODD_BYTES)
            case 4:
                data[place:] = draw.choice(others)[place:]
            case 5:
                data[place:place] = data[place : place + draw.randint(1, 40)]
            case _:
                del data[place:]
    return bytes(data)


def broken_json(good: dict[str, Any], draw: random.Random) -> bytes:
    """One or two values of a JSON body replaced, keys misspelt, or its text broken."""
    if draw.random() < 0.3:
        return broken_bytes(json.dumps(good).encode(), [b"{}", b"[" * 3000, b'{"model":' * 400], draw)
    body = copy.deepcopy(good)
    for _ in range(draw.randint(1, 2)):
        _change(body, draw)
    return json.dumps(body).encode()


def _change(body: dict[str, Any], draw: random.Random) -> None:
    place: Any = body
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.6:
            place = place[key]
            continue
        if isinstance(place, dict) and draw.random() < 0.2:
            place[draw.choice(["", "n ", "\x00", "model", "max_tokens", "x" * 200])] = place.pop(key)
        elif draw.random() < 0.1:
            del place[key]
        else:
            place[key] = copy.deepcopy(draw.choice(ODD_VALUES))
        return
