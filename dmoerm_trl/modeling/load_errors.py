"""Turn the errors of loading a model or a tokenizer into one line that says what is wrong."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from ..messages import raised_here, reason


@contextmanager
def loading(
    name: str | os.PathLike, what: str = "a model", model_type: str | None = None, *, config: bool = True
) -> Iterator[None]:
    """
    Context manager that replaces a library's loading error by one that says what is wrong with `name`.

    Args:
        name (`str`): Folder or hub name to load from.
        what (`str`): What is needed there, such as "a DMoERM".
        model_type (`str`, *optional*): The required `model_type` of its configuration; any by default.
        config (`bool`): Whether it must have a configuration; a tokenizer alone need not.

    Raises:
        ValueError: For any error except a missing package.
    """
    name = os.fspath(name)
    check_place(name, what, model_type, config=config)
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if raised_here(error):
            if not isinstance(error, ValueError) or name in str(error):
                raise
            raise ValueError(f"{name}: {error}") from error
        raise ValueError(f"{name}: {_problem(name, error)}, need {what}: {_remedy(name, error)}.") from error


def check_place(name: str, what: str = "a model", model_type: str | None = None, *, config: bool = True) -> None:
    """
    Check the folder of a model as far as that is possible without loading the model.

    Raises:
        ValueError: If it is a file, is missing, has no config.json or a broken one, or holds a model of another type.
    """
    path = Path(name).expanduser()
    need = f"need {what}, a folder as `save_pretrained` writes it or a hub name"
    if not name.strip():
        raise ValueError(f"got the empty name {name!r} of a model, {need}.")
    if path.is_file():
        raise ValueError(f"{name}: got a file, {need}: name its folder.")
    if not path.is_dir():
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ValueError(f"{name}: got a folder that is not there, {need}: fix the path.")
        return
    if not config:
        return
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        inside = sorted(found.parent.name for found in path.glob("*/config.json"))
        nearest = f": did you mean {path / inside[0]}?" if inside else "."
        raise ValueError(f"{name}: got a folder without config.json, {need}{nearest}") from None
    except ValueError as error:
        raise ValueError(
            f"{path / 'config.json'}: got broken JSON ({error}), {need}: save the model again."
        ) from error
    if model_type is not None and content.get("model_type") != model_type:
        raise ValueError(f"{name}: got a model of type {content.get('model_type')!r}, {need}: name another folder.")


def _problem(name: str, error: Exception) -> str:
    """Return what is wrong with the folder or hub name."""
    path = Path(name)
    if path.is_dir():
        if not any(any(path.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model", "tekken.json")):
            return "got a folder without a tokenizer"
        if "trust_remote_code" in str(error):
            return "got a model that brings code of its own"
        if isinstance(error, UnpicklingError):
            return "got a pickle that holds more than weights"
        return f"got a folder that cannot be read ({reason(error)})"
    causes = list(_causes(error))
    if any(isinstance(cause, HFValidationError) for cause in causes):
        return "got neither a folder nor a hub name"
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
        return (
            f"got no folder, and a hub name that is not in the cache while {_offline() or 'the hub cannot be reached'}"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return "got no folder, and a hub name that the hub does not know or does not show"
    return f"got no folder, and a hub name that cannot be read ({reason(error)})"


def _remedy(name: str, error: Exception) -> str:
    """Return what the user can do about it."""
    if "trust_remote_code" in str(error):
        return "where you trust that code, and there is a setting for it, set `trust_remote_code: true`"
    if Path(name).is_dir():
        return "save it again with `save_pretrained`, model and tokenizer in one folder"
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in _causes(error)):
        return "unset it, or name a folder" if _offline() else "check the network, or name a folder"
    if any(isinstance(cause, HfHubHTTPError) for cause in _causes(error)):
        return "fix the name, or log in with `hf auth login` if it is private"
    return "fix the name"


def _offline() -> str | None:
    """Return which environment variable switches the hub off, or None if it is on."""
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its chain of causes: transformers raises its own error from one of the hub."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
