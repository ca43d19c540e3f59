"""What is taken for personal data, and what is not. All numbers are of the kinds that are set aside for examples."""

import pytest

from dmoerm_trl.data.preference_row import PreferenceRow
from dmoerm_trl.data.prepare import personal_data
from dmoerm_trl.data.prepare.personal_data import KINDS, check_region, find_personal_data, kinds_in

pytestmark = pytest.mark.skipif(not personal_data.is_available(), reason="needs the extra `prepare`")

FOUND = {
    "email address": ["Write to jane.doe+news@mail.acme-corp.co.uk.", "(bob_1@web.de)", "jürgen@müller.de"],
    "phone number": ["Call (415) 555-2671 today", "+49 30 901820", "ring 202-456-1111."],
    "credit card number": [
        "4111 1111 1111 1111",
        "My card: 5500-0000-0000-0004",
        "378282246310005",
        "3782 822463 10005",
    ],
    "IBAN": [
        "GB82 WEST 1234 5698 7654 32 THEN",
        "an DE89370400440532013000.",
        "FR14 2004 1010 0505 0001 3M02 606 AND MORE",
    ],
    "IP address": ["来自8.8.8.8的", "from 8.8.8.8:443", "2001:4860:4860::8888", "ip=93.184.216.34,"],
    "national id": ["SSN 536-90-4399", "身份证号11010519491231002X。"],
}
NOT_FOUND = [
    "user@example.com, a@b.example and root@localhost stand for no one",
    "Tom@home is not an address, nor is @handle, nor a decorator such as @functools.cache",
    "In 1969, on 2023-10-05 at 12:00:30, 1,234,567 people and 3.14159265358979",
    "card 4111 1111 1111 1112 and 1234567812345670 fail a check",
    "GB83 WEST 1234 5698 7654 32 has a wrong sum; ABCD EFGH 1234 5678 is a key",
    "127.0.0.1, 192.168.1.20, 10.0.0.1, 999.1.1.1, v2.10.3.4 and 1.2.3",
    "std::vector<int>, 10:20:30, a::b, fe80::1, ::1 and 00:1A:2B:3C:4D:5E",
    "536-90-43999, 000-12-3456, 110105194912310021",
    "def f(x):\n    return x[0:10] + 5551234\n",
    "",
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_found(kind, text):
    assert find_personal_data(text) == {kind}


def test_every_kind_is_tested():
    assert set(FOUND) == set(KINDS)


@pytest.mark.parametrize("text", NOT_FOUND)
def test_not_found(text):
    assert find_personal_data(text) == set()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("letter", ["x", "A", "1", "-", ".", ":"])
def test_long_texts_without_a_space_take_no_longer(letter):
    assert find_personal_data(letter * 100_000) == set()


def test_phone_numbers_of_a_country():
    text = "Ruf an: 030 901820"
    assert find_personal_data(text, "DE") == {"phone number"}
    assert find_personal_data(text, "US") == set()
    assert find_personal_data("(415) 555-2671", None) == set()
    assert find_personal_data("+1 415-555-2671", None) == {"phone number"}


def test_everything_in_a_row_is_looked_at():
    turns = [{"role": "user", "content": "a@b.de"}, {"role": "assistant", "content": "8.8.8.8"}]
    row = PreferenceRow([*turns, {"role": "user", "content": "So?"}], ["Yes.", "Call +49 30 901820"], [1, 2])
    assert kinds_in(row) == {"email address", "IP address", "phone number"}
    # Prompt and responses are apart: what is cut in two by their border is nothing.
    assert kinds_in(PreferenceRow([{"role": "user", "content": "a@"}], ["b.de", "8.8.", "8.8"], [1, 2, 2])) == set()


EXAMPLES = [
    {"prompt": prompt, "response_1": "A", "response_2": "B", "preferred": 1}
    for prompt in ("Hi", "I am a@b.de and c@d.de", "I sit at 8.8.8.8")
]


def test_rows_with_personal_data_are_dropped_on_request(prepare):
    kept, audit = prepare("pairs", EXAMPLES)
    assert (len(kept), audit.flagged, audit.looked_at, audit.skipped) == (3, 2, 3, {})
    kept, audit = prepare("pairs", EXAMPLES, drop_personal_data=True)
    assert [row.prompt[0]["content"] for row in kept] == ["Hi"]
    assert audit.skipped == {"personal data": 2}
    assert (audit.flagged, audit.personal_data) == (2, {"email address": 1, "IP address": 1})


def test_without_the_extra(prepare, monkeypatch):
    monkeypatch.setattr(personal_data, "is_available", lambda: False)
    rows, audit = prepare("pairs", EXAMPLES)
    assert (len(rows), audit.looked_at) == (3, 0)
    with pytest.raises(ImportError, match=r"need them to find personal data: pip install 'dmoerm-trl\[prepare\]'"):
        prepare("pairs", EXAMPLES, drop_personal_data=True)


def test_a_region_that_is_no_country_is_an_error():
    check_region("CN")
    check_region(None)
    for region in ("ZZZ", "us", ""):
        with pytest.raises(ValueError, match="need the ISO code of a country"):
            check_region(region)
