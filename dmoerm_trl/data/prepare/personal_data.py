"""
Detect personal data in a text by patterns, which are verified by a checksum or by the tables of a library where possible.

The [`KINDS`] are found. Names, postal addresses, user names, dates of birth and other data without a fixed form are not. An IP
address may be a version number, and a phone number another number of that form. So this is a filter for obvious cases, not a
proof that a set is free of personal data.
"""

import ipaddress
import re
from collections.abc import Iterator
from importlib.util import find_spec

from ..preference_row import PreferenceRow

KINDS = ("email address", "phone number", "credit card number", "IBAN", "IP address", "national id")

# With re.ASCII, Chinese characters next to a number do not belong to it.
EMAIL = re.compile(r"[\w.+-]{1,64}@((?:[\w-]{1,63}\.)+[^\W\d_]{2,})")
PLACEHOLDER = re.compile(
    r"(?:.*\.)?(?:example\.(?:com|net|org)|example|test|invalid|localhost)", re.IGNORECASE
)  # RFC 2606
CARD = re.compile(
    r"(?<![\w.-])(?:\d{13,19}|\d{4}(?:([ -])\d{4})(?:\1\d{4}){2}|\d{4}([ -])\d{6}\2\d{5})(?![\w-]|\.\d)", re.ASCII
)
ISSUER = re.compile(r"4|5[1-5]|2[2-7]|3[0-9]|6(?:011|4|5|2)")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b", re.ASCII)
IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)", re.ASCII)
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]|\.\d)", re.ASCII)
IPV6_UNICAST = ipaddress.ip_network("2000::/3")
SOCIAL_SECURITY = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])", re.ASCII)
RESIDENT_IDENTITY = re.compile(r"(?<!\w)\d{17}[\dXx](?!\w)", re.ASCII)


def is_available() -> bool:
    """Return whether the packages of the extra `prepare` that this module needs are installed."""
    return all(find_spec(package) is not None for package in ("phonenumbers", "stdnum"))


def check_region(phone_region: str | None) -> None:
    """
    Check a phone region.

    Raises:
        ValueError: If `phone_region` is not a country of the package `phonenumbers`, which would find nothing then.
    """
    from phonenumbers import SUPPORTED_REGIONS

    if phone_region is not None and phone_region not in SUPPORTED_REGIONS:
        raise ValueError(
            f"got phone_region={phone_region!r}, need the ISO code of a country in capitals, such as 'US' or 'CN', because phone "
            "numbers are read in its format: fix it."
        )


def kinds_in(row: PreferenceRow, phone_region: str | None = "US") -> set[str]:
    """Find the kinds of personal data in a row's prompt and responses."""
    return find_personal_data("\n".join([*(turn["content"] for turn in row.prompt), *row.responses]), phone_region)


def find_personal_data(text: str, phone_region: str | None = "US") -> set[str]:
    """
    Find the kinds of personal data in a text, some of [`KINDS`].

    Args:
        text (`str`): Any text.
        phone_region (`str`, *optional*, defaults to `"US"`): ISO code of the country whose format is assumed for phone numbers
            without a country code; with None only numbers with a country code are found.

    Raises:
        ImportError: If the packages of the extra `prepare` are not installed, see [`is_available`].
    """
    return set(_find(text, phone_region))


def _find(text: str, phone_region: str | None) -> Iterator[str]:
    import phonenumbers
    from stdnum import luhn
    from stdnum.cn import ric
    from stdnum.us import ssn

    if any(not PLACEHOLDER.fullmatch(match[1]) for match in EMAIL.finditer(text)):
        yield "email address"
    if phonenumbers.PhoneNumberMatcher(IPV4.sub(" ", text), phone_region).has_next():
        yield "phone number"
    cards = (re.sub("[ -]", "", match[0]) for match in CARD.finditer(text))
    if any(ISSUER.match(card) and luhn.is_valid(card) for card in cards):
        yield "credit card number"
    if any(_is_iban(match[0]) for match in IBAN.finditer(text)):
        yield "IBAN"
    if any(_is_public_address(match[0]) for pattern in (IPV4, IPV6) for match in pattern.finditer(text)):
        yield "IP address"
    if any(ssn.is_valid(match[0]) for match in SOCIAL_SECURITY.finditer(text)) or any(
        ric.is_valid(match[0].upper()) for match in RESIDENT_IDENTITY.finditer(text)
    ):
        yield "national id"


def _is_iban(text: str) -> bool:
    """Return whether a text begins with an IBAN, which may be followed by similar characters."""
    from stdnum import iban

    compact = text.replace(" ", "")
    return any(iban.is_valid(compact[:length]) for length in range(15, len(compact) + 1))


def _is_public_address(text: str) -> bool:
    """Return whether an IP address is public: those of private networks and examples do not identify a person."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and (address.version == 4 or address in IPV6_UNICAST)
