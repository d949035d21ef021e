"""Ways to damage a file: what disks, networks and people do by accident, and what an attacker would do."""

from __future__ import annotations

import re
from random import Random

# Replacements for a number or a text in a text, JSON or YAML file.
HOSTILE = (
    b"-1", b"0", b"-0", b"1.5", b"1e400", b"-1e400", b"NaN", b"Infinity", b"1e-320", b"1e154",
    b"1000000000000", b"2147483648", b"9" * 400, b"0." + b"1" * 400, b"[" * 2000 + b"]" * 2000,
    b"null", b"true", b'""', b'"\\u0000"', b"[]", b"{}", b"\xff\xfe", b"&a [*a, *a]",
    b"!!python/object:os.system {}",
)  # fmt: skip
# Replacements for four or eight bytes of a binary file: sizes, counts and indices at their limits.
WORDS = tuple(
    value.to_bytes(size, order, signed=value < 0)
    for value in (-1, -(2**31), 2**31 - 1, 0, 10**9)
    for size in (4, 8)
    for order in ("little", "big")
)
TOKEN = re.compile(rb"-?\d+\.?\d*(?:[eE][-+]?\d+)?|\"[^\"\n]{0,40}\"|\b[a-z_]{3,20}\b")


def damage(content: bytes, random: Random, text: bool) -> tuple[str, bytes]:
    """The name of the damage, and the damaged bytes; `text` adds damage to numbers and words."""
    ways = ["bit", "bits", "cut", "zeros", "half", "noise", "moved", "word", "empty"]
    ways += ["token", "token", "tokens", "marked", "wide", "doubled"] if text else ["doubled"]
    way = random.choice(ways)
    data = bytearray(content)
    size = max(1, len(data))

    def span(most: int) -> slice:
        start = random.randrange(size)
        return slice(start, min(len(data), start + random.randint(1, most)))

    if way == "bit":
        flip(data, random, 1)
    elif way == "bits":
        flip(data, random, random.choice((4, 32, 256)))
    elif way == "cut":
        del data[random.randrange(size) :]
    elif way == "zeros":
        part = span(max(1, size // 4))
        data[part] = bytes(len(data[part]))
    elif way == "half":
        data[size // 2 :] = bytes(len(data) - size // 2)
    elif way == "noise":
        part = span(max(1, size // 16))
        data[part] = random.randbytes(len(data[part]))
    elif way == "moved":
        part, start = span(max(1, size // 8)), random.randrange(size)
        data[start : start + len(data[part])] = data[part]
    elif way == "word":
        word, start = (
            random.choice(WORDS),
            random.randrange(min(size, 4096) if random.random() < 0.5 else size),
        )
        data[start : start + len(word)] = word
    elif way == "empty":
        data.clear()
    elif way in ("token", "tokens"):
        for _ in range(1 if way == "token" else 8):
            if places := list(TOKEN.finditer(data)):
                place = random.choice(places[:200] if random.random() < 0.5 else places)
                data[place.start() : place.end()] = random.choice(HOSTILE)
    elif way == "marked":
        data[:0] = b"\xef\xbb\xbf"
    elif way == "wide":
        data = bytearray(content.decode("utf-8", "replace").encode("utf-16"))
    elif way == "doubled":
        data += content
    return way, bytes(data)


def flip(data: bytearray, random: Random, count: int) -> None:
    """Flip `count` random bits."""
    for _ in range(count if data else 0):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
