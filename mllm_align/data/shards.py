"""The files that `--data` refers to: a file, a folder or pattern of shards, a folder saved by `datasets` or
written by tensorflow-datasets, or a data set in the local Hub cache.

The files read together belong to one split of one data set, have one format, and are complete.
"""

import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from mllm_align.data import array_records
from mllm_align.data.files import SUFFIXES, DataFile, suffix_of
from mllm_align.data.roots import Roots
from mllm_align.errors import one_line, quoted, refusal
from mllm_align.files import read_json

# Words for splits in the names of files and folders -> the split.
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation", "held"), "validation")
_NUMBERED = re.compile(r"(?P<set>.+?)[-_.](?P<number>\d{1,6})-of-(?P<count>\d{1,6})(?!\d)")
_SIDE_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MAX_DEPTH = 3  # folder levels between the given folder and its shards: a data set, "data", a split
_SAVE_AGAIN = "save the data set again"


@dataclass(frozen=True)
class _Shard:
    """A data file: `name`, its path within the given folder, and the split that the name indicates."""

    path: Path
    name: str
    split: str | None = None


def data_files(
    data: str | os.PathLike,
    *,
    split: str | None = None,
    image_root: Sequence[str | os.PathLike] = (),
    allow_outside: bool = False,
) -> list[DataFile]:
    """Return the files of one data set, in the order of their names.

    data: a file, a folder, a pattern such as `shards/*.jsonl`, or the name of a data set in the local Hub
    cache. split: which one to read, if there are several. image_root: the folders that image paths are
    relative to (default: the folder of the data file). Raises `InputError` if files are missing, or if they
    are of several splits, data sets or formats. Nothing is ever downloaded.
    """
    name, within = os.fspath(data), []
    if os.path.isdir(name):  # Path.is_dir raises for some odd names
        shards = _folder(Path(name))
    elif os.path.exists(name):
        shards = [_Shard(Path(name), Path(name).name)]
        if split is not None:
            problem = f"--data.split {split} does not apply to a single file"
            raise refusal(shards[0].name, problem, "give its folder, or omit --data.split")
    elif glob.has_magic(name):
        shards = _pattern(name)
    else:
        folder = _cached(name)
        within = [folder.parent.parent]  # a snapshot's files are links into its repository's folder
        shards = _folder(folder)
    if not shards:
        raise refusal(_short(name), "holds no records", "give at least one")
    shards = _one_split(shards, split, name)
    _check_one_format(shards, name)
    if not os.path.isfile(name):
        _check_all_there(shards)

    @cache
    def roots(folder: Path) -> Roots:
        return Roots(image_root or [folder], allow_outside, within)

    shared = roots(Path()) if image_root else None
    return [DataFile(s.path, one_line(s.name, 200), shared or roots(s.path.parent)) for s in shards]


# --- finding the files --------------------------------------------------------------------------


def _folder(folder: Path) -> list[_Shard]:
    if (folder / "dataset_dict.json").is_file():
        return _saved_splits(folder)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved(folder)
    if array_records.is_built(folder):
        return [_Shard(path, path.name, split) for split, path in array_records.files_of(folder)]
    try:
        names = sorted(_names(folder))
    except OSError as error:
        problem = f"the folder cannot be read ({one_line(error)})"
        raise refusal(_short(folder), problem, "check its permissions") from error
    if not names:
        problem = f"the folder {quoted(folder)} holds no data files ({', '.join(SUFFIXES)})"
        raise refusal(_short(folder), problem, "give a data file or a folder with some")
    shards = [_Shard(folder / name, name, _split_of(name)) for name in names]
    sets = {_set_of(shard) for shard in shards}
    if len(sets) > 1:
        problem = f"{quoted(folder)} holds several data sets: {_listed(each or '.' for each in sets)}"
        raise refusal(_short(folder), problem, "name one of these folders, or files by a pattern")
    return shards


def _names(folder: Path) -> Iterable[str]:
    """Data files in a folder and its subfolders, without hidden files and metadata."""

    def fail(error: OSError) -> NoReturn:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        inside = os.path.relpath(place, folder)
        depth = 0 if inside == "." else inside.count(os.sep) + 1
        folders[:] = [name for name in folders if name[0] not in "._"] if depth < _MAX_DEPTH else []
        if array_records.is_built(Path(place)):
            files = [name for name in files if suffix_of(name) == ".array_record"]
        names = (name for name in files if name[0] not in "._" and _is_data(name))
        yield from (os.path.normpath(os.path.join(inside, name)) for name in names)


def _is_data(name: str) -> bool:
    return bool(suffix_of(name)) and name not in _SIDE_FILES


def _pattern(pattern: str) -> list[_Shard]:
    matches = sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    matches = [name for name in matches if _is_data(os.path.basename(name))]
    if not matches:
        problem = f"no data file ({', '.join(SUFFIXES)}) has a name like {quoted(pattern)}"
        raise refusal("data", problem, "check the pattern")
    base = os.path.commonpath([os.path.dirname(name) for name in matches])
    names = [os.path.relpath(name, base or ".") for name in matches]
    return [_Shard(Path(path), name, _split_of(name)) for path, name in zip(matches, names, strict=True)]


def _cached(name: str) -> Path:
    """The folder of a data set in the local Hub cache."""
    from huggingface_hub import constants, snapshot_download

    at, problem = _short(name), f"no such file: {quoted(name)}"
    if not _REPO.fullmatch(name) or suffix_of(name):
        raise refusal(at, problem, "check the path")
    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except Exception as error:  # huggingface_hub raises several types for what is missing
        problem += f", and no data set of that name in the Hub cache {quoted(constants.HF_HUB_CACHE)}"
        command = f"hf download --repo-type dataset {name}"
        raise refusal(at, problem, f"check the path, or download it first: {command}") from error


# --- folders of `datasets` ----------------------------------------------------------------------


def _saved_splits(folder: Path) -> list[_Shard]:
    """The shards of a saved DatasetDict: one folder for each split."""
    file = folder / "dataset_dict.json"
    splits = read_json(file, _SAVE_AGAIN).get("splits")
    if not isinstance(splits, list) or not all(map(_is_name, splits)) or not splits:
        raise refusal(str(file), "names no splits", _SAVE_AGAIN)
    return [
        _Shard(shard.path, f"{split}/{shard.name}", split)
        for split in splits
        for shard in _saved(folder / split)
    ]


def _saved(folder: Path) -> list[_Shard]:
    """The shards of a saved Dataset, as listed in its state.json."""
    file = folder / "state.json"
    state = read_json(file, _SAVE_AGAIN)
    listed, split = state.get("_data_files"), state.get("_split")
    if not isinstance(listed, list):
        raise refusal(str(file), "lists no data files", _SAVE_AGAIN)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise refusal(str(file), "picks rows by indices", "save the data set again after flatten_indices()")
    names: list[Any] = [each.get("filename") if isinstance(each, dict) else None for each in listed]
    for name in names:
        if not _is_name(name):
            raise refusal(str(file), f"{quoted(name)} is no file name", _SAVE_AGAIN)
        if not (folder / name).is_file():
            raise refusal(str(file), f"the listed file {quoted(name)} is missing", _SAVE_AGAIN)
    return [_Shard(folder / name, name, split if isinstance(split, str) else None) for name in names]


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0")


# --- splits -------------------------------------------------------------------------------------


def _stem(name: str) -> str:
    name, suffix = os.path.basename(name), suffix_of(name)
    return name[: name.lower().rindex(suffix)] if suffix else name


def _word(name: str) -> str | None:
    """The only word in a name that denotes a split; None if there are none or several."""
    words = {word for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS}
    return words.pop() if len(words) == 1 else None


def _split_of(name: str) -> str | None:
    """The split indicated by the name of a file, else by one of its folders; None if neither does.

    In `train-00000-of-00002` the split is the part before the number, whatever word it is.
    """
    numbered = _NUMBERED.match(_stem(name))
    stem = numbered["set"] if numbered else _stem(name)
    word = _word(stem)
    if word is not None:
        return stem if numbered else word
    folders = reversed(os.path.dirname(name).split(os.sep))
    folder = next((folder for folder in folders if _word(folder) is not None), None)
    return folder or (stem if numbered else None)


def _set_of(shard: _Shard) -> str:
    """The data set's folder within the given one, without folders named "data" or after a split."""
    folders = os.path.dirname(shard.name).split(os.sep)
    return "/".join(f for f in folders if f not in ("data", shard.split) and f.lower() not in _SPLITS)


def _one_split(shards: list[_Shard], split: str | None, name: str) -> list[_Shard]:
    at = _short(name)
    found = {shard.split for shard in shards}
    names = _listed(each for each in found if each is not None)
    if split is None:
        if len(found) == 1:
            return shards
        problem = f"holds several splits: {names}"
        if None in found:
            without = (shard.name for shard in shards if shard.split is None)
            problem = f"holds the splits {names} and files that name none: {_listed(without)}"
        raise refusal(at, problem, "name one with --data.split")
    canonical = _SPLITS.get(split.lower())
    matches = {each for each in found if each and canonical and _SPLITS.get(_word(each) or "") == canonical}
    wanted = split if split in found else matches.pop() if len(matches) == 1 else None
    if wanted is None:
        has = f"its splits are {names}" if names else "its files name no split"
        raise refusal(at, f"has no split {quoted(split)}: {has}", "give another --data.split")
    return [shard for shard in shards if shard.split == wanted]


def _check_one_format(shards: list[_Shard], name: str) -> None:
    formats = {suffix_of(shard.name): shard.name for shard in shards}
    if len(formats) > 1:
        problem = f"holds files of several formats: {_listed(formats.values())}"
        raise refusal(_short(name), problem, "select some by a pattern, such as 'FOLDER/*.jsonl'")


def _check_all_there(shards: list[_Shard]) -> None:
    """Refuse shards `-of-00005` if some of the five are missing or duplicated, and a built data set without
    all of its own. A pattern may select some."""
    for folder in {shard.path.parent for shard in shards}:
        if array_records.is_built(folder):
            array_records.files_of(folder)
    sets: dict[tuple[Path, str], list[re.Match[str]]] = defaultdict(list)
    for shard in shards:
        numbered = _NUMBERED.match(shard.path.name)
        if numbered:
            sets[shard.path.parent, numbered["set"]].append(numbered)
    for (folder, name), found in sets.items():
        at = _short(folder)
        counts = {int(each["count"]) for each in found}
        if len(counts) > 1:
            problem = f"has shards of {name} 'of {_listed(map(str, counts))}'"
            raise refusal(at, problem, "keep those of one set")
        if len({int(each["number"]) for each in found}) < len(found):
            twice = sorted(each.string for each in found)
            raise refusal(at, f"has a shard of {name} twice: {_listed(twice)}", "keep one of each")
        there = {each[0] for file in os.listdir(folder) if (each := _NUMBERED.match(file))}
        first, width = found[0], len(found[0]["number"])
        start, end = first.start("number"), first.end("number")
        names = (f"{first[0][:start]}{n:0{width}d}{first[0][end:]}" for n in range(counts.pop()))
        missing = [name for name in names if name not in there]
        if missing:
            problem = f"of the shards {name}, {len(missing)} are missing: {_listed(missing)}"
            raise refusal(at, problem, "add them, or rename those to read")


def _short(path: str | Path) -> str:
    return one_line(Path(path).name or path)


def _listed(names: Iterable[str], max_count: int = 4) -> str:
    names = sorted(names)
    more = f" and {len(names) - max_count} more" if len(names) > max_count else ""
    return ", ".join(one_line(name) for name in names[:max_count]) + more
