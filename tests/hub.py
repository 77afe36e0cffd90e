"""Stands for the Hugging Face Hub's client."""

from pathlib import Path
from typing import Any


class Url(str):
    repo_id: str


class Hub:
    """Takes what is pushed; who is logged in is `me`."""

    repositories: list[Any] = []
    made: list[Path] = []

    def __init__(self, library_name: str):
        pass

    def create_repo(self, name: str, **how: Any) -> Url:
        whole = name if "/" in name else f"me/{name}"
        self.repositories.append((whole, how))
        url = Url(f"https://hub/{whole}")
        url.repo_id = whole
        return url

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert repo_id == self.repositories[-1][0]
        self.made.append(folder_path)
