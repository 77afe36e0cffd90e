"""Records of one response each."""

from pathlib import Path

from runs import rows, write_pairs


def sft_records(folder: Path) -> Path:
    """Records of one response, two sentences each."""
    given = [
        {**{k: row[k] for k in ("prompt", "images")}, "chosen": f"Yes, {row['rejected']} {row['chosen']}"}
        for row in rows(4)
    ]
    return write_pairs(folder, given, "records.jsonl")
