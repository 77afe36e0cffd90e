"""One record as the model gets it, in words."""

from __future__ import annotations

from typing import Any

import numpy as np

from mllm_align.data.encode import Encoded, Encoder


def describe(encoder: Encoder, encoded: Encoded) -> dict[str, Any]:
    """A record's tiles, tokens, positions and loss mask as plain values.

    `prefix` and each of `responses` list runs: a text token each, or the embeddings of one image tile
    or line, or of an image without tiles, together. Every entry has `positions` (first, last), `id`,
    `text` and `loss` (1 where the token's log-prob counts). Pixels are read, so a damaged image shows
    here.
    """
    (prefix,) = encoder.group(encoded).prefixes
    tokens, pixels = prefix.tokens, prefix.patches
    assert pixels is not None
    images = []
    for source, (width, height) in zip(encoded.record.images, encoded.sizes, strict=True):
        grid = encoder.layout.grid(height, width, len(encoded.sizes))
        runs = encoder.layout.runs(height, width, len(encoded.sizes), 0)
        rows = np.concatenate([run.rows for run in runs])
        images.append(
            {
                "source": source.label,
                "width": width,
                "height": height,
                "tiles": encoder.layout.tiles(height, width, len(encoded.sizes))[0],
                "grid": None if grid is None else list(grid),
                "embeddings": len(rows),
                "newlines": int((rows == 0).sum()),
            }
        )
    start = len(tokens)
    responses = []
    for ids in encoded.responses:
        entries = [_token(encoder, start + i, int(t), 1) for i, t in enumerate(ids)]
        responses.append(entries)
    return {
        "id": encoded.record.id,
        "where": encoded.record.where,
        "images": images,
        "pixels": {
            "shape": list(pixels.shape),
            "min": float(pixels.min()) if pixels.size else None,
            "max": float(pixels.max()) if pixels.size else None,
        },
        "prefix_tokens": len(tokens),
        "response_tokens": [len(r) for r in encoded.responses],
        "prefix": _prefix(encoder, tokens, prefix.image),
        "responses": responses,
    }


def _token(encoder: Encoder, position: int, token: int, loss: int) -> dict[str, Any]:
    text = encoder.tokenizer.convert_ids_to_tokens(token)
    return {"positions": [position, position], "id": token, "text": text, "loss": loss}


def _prefix(encoder: Encoder, tokens: np.ndarray, image: np.ndarray) -> list[dict[str, Any]]:
    size = encoder.layout.tokens
    entries: list[dict[str, Any]] = []
    for position, (token, row) in enumerate(zip(tokens, image, strict=True)):
        if row < 0:
            entries.append(_token(encoder, position, int(token), 0))
            continue
        tile = "image" if size == 1 else f"tile {(int(row) - 1) // size}"  # a tile may be one embedding
        what = "image_newline" if row == 0 else tile
        last = entries[-1] if entries else None
        if last is not None and last["text"] == what:
            last["positions"][1] = position
        else:
            span = [position, position]
            entries.append({"positions": span, "id": int(token), "text": what, "loss": 0})
    return entries


def text(described: dict[str, Any]) -> str:
    """`describe` for a terminal."""
    out = [f"record {described['id']}  ({described['where']})"]
    for n, image in enumerate(described["images"]):
        grid = "" if image["grid"] is None else f" = 1 + {image['grid'][0]} x {image['grid'][1]}"
        out.append(
            f"image {n}: {image['source']}: {image['width']} x {image['height']} pixels, "
            f"{image['tiles']} tiles{grid}, {image['embeddings']} embeddings, {image['newlines']} newlines"
        )
    pixels = described["pixels"]
    if pixels["min"] is not None:
        out.append(f"pixels {pixels['shape']} from {pixels['min']:.3f} to {pixels['max']:.3f}")
    counts = " + ".join(str(n) for n in described["response_tokens"])
    out.append(f"tokens: prefix {described['prefix_tokens']}, responses {counts}")
    out.append("  positions        id  loss  text")
    parts = [("prefix", described["prefix"])]
    parts += [(f"response {k}", rows) for k, rows in enumerate(described["responses"])]
    for name, rows in parts:
        out.append(f"-- {name}")
        for row in rows:
            first, last = row["positions"]
            span = str(first) if first == last else f"{first}..{last}"
            out.append(f"  {span:>11} {row['id']:>9}  {row['loss']:>4}  {row['text']!r}")
    return "\n".join(out)
