"""Inputs that are nearly right: a sound document with some of its values, keys or bytes changed. All from a
random.Random, so that an input is its seed."""

import copy
import json

JUNK = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63), 0.5, -0.0, 1e308, float("nan")),
    *("", "a", "..", "../x", "/etc/passwd", "\0", "\ud800", "x" * 5000, "F32", "BOOL", "train", [], {}, [[]], [{}]),
    *([0], [-1, 2**62], [0] * 70, {"": None}, {"a": {"b": []}}, {"type": "BPE"}),
]


def nodes(value, path=()):
    """The paths to all values of a JSON document."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from nodes(child, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def changed_json(document, chance):
    """Return a copy with one to three of its values replaced, taken out, moved, doubled or under other names."""
    root = [copy.deepcopy(document)]
    for _ in range(chance.randint(1, 3)):
        paths = [path for path in nodes(root) if path]
        *way, key = chance.choice(paths)
        parent = at(root, way)
        kind = chance.randrange(7)
        if kind == 0:
            parent[key] = copy.deepcopy(chance.choice(JUNK))
        elif kind == 1 and way:
            del parent[key]
        elif kind == 2:
            parent[key] = copy.deepcopy(at(root, chance.choice(paths)))
        elif kind == 3 and isinstance(parent, dict):
            parent[chance.choice([str(key) + "x", "", "__metadata__", "..", "warploom", "\0"])] = parent.pop(key)
        elif kind == 4 and isinstance(parent[key], int) and abs(parent[key]) < 2**70:
            parent[key] += chance.choice([-1, 1, 8, -(2**20), 2**31, 2**62])
        elif kind == 5 and isinstance(parent, list) and len(parent) < 1000:
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == 6 and isinstance(parent[key], str):
            parent[key] = parent[key][: chance.randrange(len(parent[key]) + 1)] + chance.choice(
                ["", "\ud800", "é", "0"]
            )
    return root[0]


def encoded(document, chance):
    """Return the document as UTF-8 JSON, now and then in a way that Python's own writer never takes."""
    text = json.dumps(document, separators=chance.choice([(",", ":"), (", ", ": ")]))
    if not chance.randrange(20):
        depth = chance.choice([10, 1000, 100_000])
        text = text.replace("null", "[" * depth + "]" * depth) if "null" in text else "[" * depth
    if not chance.randrange(20):
        # The first key once more.
        text = text.replace("{", '{"' + chance.choice(["format", "a", "version"]) + '":0,', 1) * chance.randint(1, 2)
    return text.encode()


def changed_bytes(data, chance):
    """Return the bytes with some of them flipped, cut off, doubled, taken out or put in."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data) + 1)
        length = chance.choice([1, 1, 2, 8, 64, 1000])
        kind = chance.randrange(6)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = chance.randbytes(length)
        elif kind == 4:
            data[place:place] = data[place : place + length]
        else:
            # Numbers of a header, as far as there is one.
            place = chance.choice([0, 4, 8, 12, 16, 24])
            number = chance.choice([0, 1, 2**16, 2**31 - 1, 2**32, 2**63 - 1, 2**64 - 1, len(data)])
            data[place : place + 8] = number.to_bytes(8, "little")
    return bytes(data)
