"""BDHS as a resumable job: from a file of SFT records to a file of preference pairs.

During the run, finished pairs are appended to OUT.part, whose first line (the stamp) identifies config,
model and data. At the end they are sorted into the order of the data and written to OUT; OUT.log.jsonl
records the run. The log is written before OUT, and OUT.part is removed last, so a job may be interrupted at
any point.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from mllm_align import processes
from mllm_align.config import BDHSConfig, to_json
from mllm_align.data.encode import fingerprint, image_digest
from mllm_align.data.images import ImageSource, load_rgb
from mllm_align.data.preferences import FIELD
from mllm_align.data.records import Record
from mllm_align.data.table import LeftOut
from mllm_align.errors import WEIGHTS, InputError, not_finite, one_line, refusal
from mllm_align.files import json_text, new_file, parse_json
from mllm_align.generation.bdhs import BDHS, BDHSResult, candidates, check, neighbour
from mllm_align.generation.decode import Generator
from mllm_align.generation.similarity import Similarity, open_similarity
from mllm_align.locks import alone
from mllm_align.models.bundle import Bundle, opened
from mllm_align.part_file import PartFile, explained, tell_finished
from mllm_align.prepare import check_batch, name_weights, prepare
from mllm_align.progress import progress_bar


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count` of the records: number, number + count, ..."""

    number: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "0/4". Raises InputError for anything else."""
        found = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text)
        if not found or not int(found[1]) < int(found[2]):
            raise InputError(
                f"--shard is {one_line(text)!r}; give part/parts, as 0/4 to 3/4 for four hosts"
            )
        return cls(int(found[1]), int(found[2]))

    def name(self, out: Path) -> Path:
        """pairs.jsonl -> pairs-00000-of-00004.jsonl"""
        part = f"-{self.number:05d}-of-{self.count:05d}"
        return out if self.count == 1 else out.with_name(f"{out.stem}{part}{out.suffix}")


def bdhs(
    config: BDHSConfig,
    model: str | Path | Bundle,
    data: Any,
    out: str | Path,
    shard: Shard | None = None,
) -> dict[str, Any]:
    """Write `out`: one preference pair per record of `data`, with rejected responses from the model.

    config: a BDHSConfig, how the responses are made. model: a Bundle, or what `load` takes. data: a data
    set in files, or rows, with a prompt, images and one response each. An interrupted job is resumed.
    Returns a summary: pairs, left_out (ids of records whose rejected response is empty or equals the
    chosen one), differ_after (share of the pairs that differ enough after each iteration), seconds.
    Raises InputError for unusable data, and if `out` belongs to another job; NotFinite if logits or
    similarities of some records are not finite, after all other records, which the job keeps.
    """
    began, shard = time.time(), shard or Shard()
    out = shard.name(Path(out))
    if out.suffix.lower() != ".jsonl":
        raise refusal(str(out), "is not a .jsonl name", "give --out a name that ends in .jsonl")
    with alone(out):
        return _bdhs(config, opened(model, config.dtype, config.mesh), data, out, shard, began)


def _bdhs(
    config: BDHSConfig, bundle: Bundle, data: Any, out: Path, shard: Shard, began: float
) -> dict[str, Any]:
    similarity = open_similarity(config.similarity)
    encoder, encoded, left_out = prepare(bundle, data, config.data, responses=1)
    check(encoded, encoder, config, config.data.max_length or bundle.config.decoder.max_length)
    check_batch(config.batch_size, len(encoded))
    total, encoded = len(encoded), encoded[shard.number :: shard.count]
    if not encoded:
        raise InputError(f"--shard {shard.number}/{shard.count} has none of the {total} records; use fewer")
    settings = bundle.processor.image_processor.to_json_string()
    names: list[Any] = [(each.record.id, each.record.responses[0]) for each in encoded]
    if config.distortion == "retrieved":
        others = [image for each in encoded for several in candidates(each.record) for image in several]
        names += [image_digest(image).hex() for image in others]
    name_weights(bundle.folder)
    stamp = {
        "config": to_json(config),
        "model": bundle.folder.fingerprint,
        "trained": trained_digest(bundle.trained),
        "data": fingerprint(encoded, settings + json.dumps(names)),
        "dtype": str(bundle.dtype),
        "shard": f"{shard.number}/{shard.count}",
    }
    job = _Output(out, stamp, {each.index for each in encoded})
    state = processes.on_first(lambda: {"done": job.start(), "finished": [*job.finished.values()]})
    if state["done"] is not None:
        tell_finished(out)
        return state["done"]
    job.finished = {row["index"]: row for row in state["finished"]}
    todo = [record for record in encoded if record.index not in job.finished]
    by_index = {record.index: record.record for record in encoded}
    roots = _image_roots(config, data, out)
    with progress_bar(len(encoded), "bdhs") as bar, job:
        bar.update(len(encoded) - len(todo))
        generator = Generator(bundle, config.sampling, config.batch_size)
        maker = BDHS(generator, encoder, config, similarity, config.seed)
        broken: list[BDHSResult] = []
        for result in maker(todo):
            if result.broken:
                broken.append(result)
                continue
            metadata = _metadata(result, config, similarity, maker.threshold, stamp)
            record = by_index[result.index]
            if config.distortion == "retrieved":
                record = replace(record, rejected_images=neighbour(record, result.iterations - 1))
            job.add(result.index, _row(record, result, metadata, out, roots))
            bar.update()
    if broken:
        what = " and ".join(sorted({str(each.broken) for each in broken}))
        ids = [by_index[index].id for index in sorted(each.index for each in broken)]
        kept = len(job.finished)
        remedy = f"{kept} pairs are kept, and the same command tries the others again; {WEIGHTS}"
        raise not_finite(f"{what} are", ids, len(encoded), remedy)
    return job.close(by_index, maker.threshold, config.iterations, left_out, time.time() - began)


class _Output(PartFile):
    """The job's rows, and its log."""

    def __init__(self, out: Path, stamp: dict[str, Any], indices: Collection[int]):
        super().__init__(out, "bdhs", stamp, indices, _is_row)
        self.log = out.with_name(out.name + ".log.jsonl")

    def start(self) -> dict[str, Any] | None:
        """Read what an earlier run left; its summary, if that run was complete."""
        with explained(self.out):
            if self.out.exists() or self.out.is_symlink():
                summary = self._summary()
                if summary is None:
                    raise refusal(
                        str(self.out),
                        "exists and is not this job's output",
                        "give another --out or remove it",
                    )
                self.part.unlink(missing_ok=True)
                return summary
        self.open()
        return None

    def _summary(self) -> dict[str, Any] | None:
        """This job's summary in the last event of the log, if it is there."""
        with suppress(OSError, ValueError, IndexError, KeyError, TypeError):
            last = parse_json(self.log.read_bytes().splitlines()[-1])
            if last["stamp"] == self.stamp and _is_summary(last["summary"]):
                return last["summary"]
        return None

    def close(
        self,
        records: dict[int, Record],
        threshold: float,
        iterations: int,
        left_out: Sequence[LeftOut],
        seconds: float,
    ) -> dict[str, Any]:
        """Write the sorted pairs to OUT and the summary to the log; returns the summary."""
        rows = [self.finished[index] for index in sorted(self.finished)]
        good = [row for row in rows if _usable(row)]
        tries = [row["bdhs"]["similarities"] for row in rows]
        differ = [
            sum(any(s < threshold for s in each[: i + 1]) for each in tries) / len(tries)
            for i in range(iterations)
        ]
        summary = {
            "pairs": len(good),
            "left_out": [records[row["index"]].id for row in rows if not _usable(row)],
            "over_long": [each.id for each in left_out],  # with one response, there are no identical ones
            "differ_after": differ,
            "unfinished": sum(row["bdhs"]["unfinished"] for row in rows),
            "seconds": round(seconds, 3),
        }
        if not good:
            raise InputError(
                f"no rejected response of {len(rows)} is usable: all are empty or equal the chosen"
            )
        if not processes.first():
            return summary
        event = {"event": "bdhs", "time": round(time.time(), 3), "summary": summary, "stamp": self.stamp}
        with explained(self.log), open(self.log, "a", encoding="utf-8") as file:
            file.write(json_text(event) + "\n")
        with new_file(self.out) as file:
            file.writelines(json_text(row) + "\n" for row in good)
        self.part.unlink()
        return summary


def _is_row(row: Any) -> bool:
    """Whether a finished row has the fields used later. May raise KeyError or TypeError if it has not."""
    metadata = row["bdhs"]
    texts = isinstance(row["chosen"], str) and isinstance(row["rejected"], str)
    tries = isinstance(metadata["similarities"], list) and bool(metadata["similarities"])
    tries = tries and all(type(each) in (int, float) for each in metadata["similarities"])
    return texts and tries and type(metadata["unfinished"]) in (int, bool)


def _is_summary(summary: Any) -> bool:
    """Whether a log's summary has the fields used later; may raise, too."""
    shares = all(type(share) in (int, float) for share in summary["differ_after"])
    return shares and type(summary["pairs"]) is int and isinstance(summary["left_out"], list)


def _usable(row: dict[str, Any]) -> bool:
    """Whether the pair can be used for training: readers refuse others."""
    rejected = row["rejected"].strip()
    return bool(rejected) and rejected != row["chosen"].strip() and "<image>" not in rejected


def _metadata(
    result: BDHSResult, config: BDHSConfig, similarity: Similarity, threshold: float, stamp: dict[str, Any]
) -> dict[str, Any]:
    """Metadata of an output record: how its rejected response was generated."""
    return {
        "iterations": result.iterations,
        "guided": result.guided,
        "similarity": result.similarity[-1],
        "similarities": list(result.similarity),
        "similarity_by": similarity.name,
        "threshold": threshold,
        "distortion": config.distortion,
        "mask_share": result.mask_share,
        "sentences": list(result.sentences),
        "unfinished": result.unfinished,
        "seed": config.seed,
        "model": stamp["model"],
        "trained": stamp["trained"],
    }


def _image_roots(config: BDHSConfig, data: Any, out: Path) -> list[Path]:
    """The folders that image paths are relative to; for rows in memory, the folder of `out`."""
    if config.data.image_root:
        return [root.resolve() for root in config.data.image_root]
    if not isinstance(data, str | os.PathLike):
        return [out.parent.resolve()]
    folder = Path(data) if os.path.isdir(data) else Path(data).parent
    while glob.has_magic(str(folder)) and not folder.exists():  # the fixed part of a pattern
        folder = folder.parent
    return [folder.resolve()]


def _row(
    record: Record, result: BDHSResult, metadata: dict[str, Any], out: Path, roots: list[Path]
) -> dict[str, Any]:
    others = [_image(source, out, roots) for source in record.rejected_images]
    return {
        "id": record.id,
        "images": [_image(source, out, roots) for source in record.images],
        **({"rejected_images": others} if others else {}),
        "prompt": [message.chat() for message in record.messages],
        **({FIELD: dict(record.preferences)} if record.preferences else {}),
        "chosen": record.responses[0],
        "rejected": result.rejected,
        "bdhs": metadata,
    }


def _image(source: ImageSource, out: Path, roots: list[Path]) -> str:
    """The image's path, relative to the data's image folder that contains it, if any. An image given as
    bytes or decoded is written beside `out`."""
    if source.path is not None:
        for i, root in enumerate(roots):
            if source.path.is_relative_to(root):
                name = source.path.relative_to(root)
                if not any((before / name).exists() for before in roots[:i]):
                    return name.as_posix()
        return str(source.path)
    data = source.read()
    if data is None:  # as the model sees it: PNG has neither every mode nor the orientation
        buffer = io.BytesIO()
        load_rgb(source).save(buffer, "PNG")
        data = buffer.getvalue()
    suffix = (Image.open(io.BytesIO(data)).format or "png").lower()
    folder = out.with_name(out.stem + "-images")
    file = folder / f"{hashlib.sha256(data).hexdigest()[:20]}.{suffix}"
    if not file.exists() and processes.first():
        with new_file(file, "wb") as opened:
            opened.write(data)
    return os.path.relpath(file, out.parent)


def trained_digest(trained: Any) -> str | None:
    """Names what a run has trained over its checkpoint; None for a checkpoint as it is."""
    leaves = jax.tree.leaves(trained)
    if not leaves:
        return None
    digest = hashlib.sha256()
    for leaf in leaves:
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]
