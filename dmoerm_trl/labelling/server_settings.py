"""Settings of a judge's server that may contain secrets: its address, its key, and further fields of the request."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

from .judges import JudgeError
from .redaction import PART, looks_secret


def read_address(url: Any) -> SplitResult:
    """
    Parse `base_url`.

    Raises:
        ValueError: If it is not a bare address. The message does not show it.
    """
    with suppress(ValueError):
        parts = urlsplit(url) if isinstance(url, str) and url.isprintable() else None
        bare = parts is not None and not re.search(r"[@?#\\\s]", url)
        if bare and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    need = "an http(s) address without a user, a password, a query or blanks"
    raise ValueError(f"`judge` of the recipe: got base_url=[not shown], need {need}: change it.")


def read_key(variable: Any) -> str | None:
    """
    Read the key from an environment variable; `None` if no variable is given.

    Raises:
        JudgeError: If the variable holds no key, or a key that cannot be sent. The message holds no secret, not even a key
            given by mistake instead of the variable's name.
        ValueError: If `variable` is not a name.
    """
    if variable is None:
        return None
    if not isinstance(variable, str) or "\0" in variable:
        raise ValueError(
            "`judge` of the recipe: got an `api_key_env` that is not a name, need the name of an environment variable."
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        usual = re.fullmatch("[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", variable)  # otherwise it may be the key itself
        raise JudgeError(
            f"got no key in the environment variable {variable if usual else 'that `api_key_env` names'}, need one because the "
            "server may ask for it: set it, name another variable in `api_key_env`, or set `api_key_env: null` for a server "
            "that wants none."
        )
    if not (key.isascii() and key.isprintable()):
        raise JudgeError(
            f"got a key in the environment variable {variable} with a line break or a character outside ASCII, need one "
            "without because it is sent in a header: copy it anew."
        )
    return key


def read_extra_body(extra: Any) -> dict[str, Any]:
    """
    Check further fields of the request.

    Raises:
        ValueError: If a value is not valid in JSON, or a field is set by the judge itself. The message shows no values.
    """
    if extra is None:
        return {}
    if not isinstance(extra, Mapping) or not all(isinstance(name, str) for name in extra):
        raise ValueError(
            f"`judge` of the recipe: got a {type(extra).__name__} as extra_body, need fields of the request: name -> value."
        )
    if own := extra.keys() & {"messages", "stream", "n"}:
        raise ValueError(
            f"`judge` of the recipe: got extra_body={{{', '.join(map(repr, own))}}}, need other fields, because each question "
            "gets one complete answer: remove them."
        )
    try:
        json.dumps(extra, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError):
        raise ValueError(
            f"`judge` of the recipe: got extra_body={{{', '.join(map(repr, extra))}}}, need values that JSON can hold: change them."
        ) from None
    return dict(extra)


def digests(value: Any) -> Any:
    """Replace each text in a value of `extra_body` by its digest."""
    if isinstance(value, str):
        return f"sha256 {hashlib.sha256(value.encode()).hexdigest()[:16]}"
    if isinstance(value, Mapping):
        return {name: digests(part) for name, part in value.items()}
    return [digests(part) for part in value] if isinstance(value, (list, tuple)) else value


def secrets_of(value: Any, named: bool = False) -> Iterator[str]:
    """Yield the texts in `extra_body` that look like secrets, or whose field names suggest one."""
    if isinstance(value, str):
        if looks_secret(value) or (named and len(value) >= PART):
            yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from secrets_of(part, named or bool(_SECRET_NAME.search(str(name))))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from secrets_of(part, named)


_SECRET_NAME = re.compile("key|token|secret|pass|auth|credential", re.IGNORECASE)
