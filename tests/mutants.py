"""Hostile variants of a JSON file: types swapped, fields dropped, nesting, numbers that can't be meant."""

import json
import random

VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1e308,
    3.5,
    "",
    "x",
    "\u0000",
    "1",
    [],
    {},
    [[]],
    {"a": 1},
    [1, "x", None],
]
TEXTS = [
    "",
    "{",
    "[]",
    "null",
    "1",
    '"x"',
    "NaN",
    "[" * 100_000,
    '{"a":' * 5000,
    "\ufeff{}",
    "9" * 5000,
    "{}}",
]
LITERALS = ["NaN", "Infinity", "-Infinity", "1" + "0" * 400, "9" * 5000, "[" * 300 + "]" * 300, "1e999"]
KINDS = ["value", "value", "value", "drop", "literal", "deep", "text", "cut", "bytes", "more"]
MARK = "-- a literal --"


def paths(value, path=()):
    """Where something may be changed, the root not among it."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, below in items:
        yield (*path, key)
        yield from paths(below, (*path, key))


def mutant(text: str, rng: random.Random) -> bytes:
    """A JSON text with one thing wrong."""
    kind = rng.choice(
        ["value", "value", "value", "drop", "literal", "deep", "text", "cut", "bytes", "more"]
    )
    if kind == "text":
        return rng.choice(TEXTS).encode()
    if kind == "cut":
        return text[: rng.randrange(len(text))].encode()
    if kind == "bytes":
        where = rng.randrange(len(text))
        return text[:where].encode() + bytes([rng.randrange(128, 256)]) + text[where:].encode()
    tree = json.loads(text)
    *above, last = rng.choice([*paths(tree)])
    node = tree
    for key in above:
        node = node[key]
    if kind == "drop":
        del node[last]
    elif kind == "more" and isinstance(node, dict):
        node["more"] = rng.choice(VALUES)
    elif kind == "deep":
        for _ in range(rng.choice([2, 90, 200])):
            node[last] = rng.choice([[node[last]], {"a": node[last]}])
    else:
        node[last] = MARK if kind == "literal" else rng.choice(VALUES)
    return json.dumps(tree).replace(f'"{MARK}"', rng.choice(LITERALS)).encode()
