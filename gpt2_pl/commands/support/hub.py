"""Upload of a folder to the Hugging Face hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from gpt2_pl.errors import InputError, RunError, require


def check(repository: str) -> None:
    """Check, before anything is computed, that a model can be uploaded.

    The token is that of ``hf auth login`` or of the environment variable HF_TOKEN.

    Args:
        repository: id of the repository, USER/NAME.

    Raises:
        InputError: the id is invalid, there is no token, or the hub is switched off (HF_HUB_OFFLINE).
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    expected = "USER/NAME of letters, digits, '-', '_' and '.'"
    require(repository.count("/") == 1, "push_to_hub", repository, expected)
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise InputError(key="push_to_hub", value=repository, expected=expected) from None
    if constants.is_offline_mode():
        raise InputError("push_to_hub: HF_HUB_OFFLINE is set, which disables the hub", key="push_to_hub")
    if get_token() is None:
        raise InputError("push_to_hub requires a token; run hf auth login, or set HF_TOKEN", key="push_to_hub")


def push(folder: Path, repository: str, private: bool) -> str:
    """Create a repository if it does not exist, and upload the files of a folder in one commit.

    Args:
        folder: the folder.
        repository: id of the repository, USER/NAME.
        private: whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        RunError: the hub cannot be reached or refuses the request.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a model of gpt2_pl")
    except Exception as error:  # the hub client raises its own classes, httpx's and OSError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        again = shlex.join(["hf", "upload", repository, str(folder)])
        raise RunError(f"{folder} is complete, but it was not uploaded: {reason}; upload it with: {again}") from error
    return str(url)
