"""An exported folder on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from mllm_align.errors import InputError, one_line, quoted


def check_name(name: str) -> None:
    """Raises InputError for what can't be the name of a repository: owner/name, or a name of one's own."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push is {quoted(name)}; give owner/name, as on the Hub") from error


def push(folder: Path, name: str) -> str:
    """Upload a folder to the repository of this name, and return its address.

    A repository that is not there is made, private. The log-in is that of `hf auth login`, or HF_TOKEN.
    Raises InputError, with the command to push it later, where the Hub can't be reached or refuses.
    """
    import huggingface_hub

    try:
        hub = huggingface_hub.HfApi(library_name="mllm_align")
        place = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=place.repo_id, folder_path=folder, commit_message="Export of mllm_align")
    except Exception as error:  # of log-in, network and server, many kinds
        said = f"{type(error).__name__}: {one_line(error, 200)}"
        remedy = f"see to the network and the log-in (hf auth login), then: hf upload {name} {folder}"
        raise InputError(f"{folder} is whole, but can't be pushed to {name} ({said}); {remedy}") from error
    return str(place)
