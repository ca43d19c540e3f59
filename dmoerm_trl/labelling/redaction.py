"""Redaction of secrets that a server may echo in its replies: verbatim, in part, or in another encoding."""

import base64
import html
import re
from collections.abc import Iterable, Iterator
from urllib.parse import unquote

PART = 8
"""Length of the shortest part of a secret that is hidden; a shorter secret is hidden only as a whole."""

HIDDEN = "[key]"

_LOWER = {capital: capital + 32 for capital in range(ord("A"), ord("Z") + 1)}  # keeps the length, unlike `str.lower`


class Redaction:
    """
    Callable that hides secrets in texts.

    Secrets are recognised in any case, reversed, in base64 and in hexadecimal. If a text contains one in escapes, such as
    `%73`, `\\u0073` or `&#115;`, the entire text is hidden.

    Args:
        secrets (`Iterable[str]`): Secrets to hide.
    """

    def __init__(self, secrets: Iterable[str]):
        forms = {form.translate(_LOWER) for secret in secrets if secret for form in _forms(secret)}
        self._whole = {form for form in forms if len(form) < PART}
        self._parts = {form[at : at + PART] for form in forms for at in range(len(form) - PART + 1)}

    def __call__(self, text: str) -> str:
        hidden = self._hide(text)
        if hidden == text and any(self._hide(plain) != plain for plain in _unescaped(text)):
            return HIDDEN
        return hidden

    def _hide(self, text: str) -> str:
        if not (self._parts or self._whole):
            return text
        lowered = text.translate(_LOWER)
        spans = [(at, at + PART) for at in range(len(text) - PART + 1) if lowered[at : at + PART] in self._parts]
        spans += [found.span() for form in self._whole for found in re.finditer(re.escape(form), lowered)]
        kept, end = [], 0
        for start, stop in sorted(spans):
            if start > end or not kept:
                kept += [text[end:start], HIDDEN]
            end = max(end, stop)
        return "".join([*kept, text[end:]])


def looks_secret(text: str) -> bool:
    """Whether a text may be a key or a password: a long word with other characters than lower-case letters and `_.-`."""
    return len(text) >= PART and not re.search(r"\s", text) and not re.fullmatch(r"[a-z_.-]+", text)


def _forms(secret: str) -> Iterator[str]:
    """
    Yield the spellings of a secret. In base64, preceding text shifts it by up to two bytes and changes its first and last
    characters.
    """
    yield secret
    if len(secret) < PART:
        return
    yield secret[::-1]
    raw = secret.encode(errors="surrogatepass")
    yield raw.hex()
    for shift in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(b"\0" * shift + raw).decode()[4 if shift else 0 :].rstrip("=")[:-1]


def _unescaped(text: str) -> Iterator[str]:
    """Yield the text with its escapes of all kinds resolved once, twice and three times."""
    for _ in range(3):  # escapes may be nested
        text = html.unescape(unquote(_ESCAPE.sub(lambda found: chr(int(found[1] or found[2], 16)), text)))
        yield text


_ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2}))")
