from __future__ import annotations

import traceback
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mien import passwords
from mien.errors import InvalidPassword

# One derivation takes 64 MiB and tens of milliseconds on purpose.
slowly = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_a_password_gives_the_code_it_always_gave() -> None:
    """The code is a format: if this changes, nothing anonymized before can be recovered."""
    import hashlib

    from argon2.low_level import Type, hash_secret_raw

    salt = hashlib.sha256(b"mien/code/v1\0mien\x0016").digest()[:16]
    raw = hash_secret_raw(b"correct horse", salt, 3, 65536, 4, 4, Type.ID)
    expected = "".join(f"{byte:08b}" for byte in raw)[:16]
    assert passwords.format_code(passwords.derive_code("correct horse")) == expected == "0101011000011010"


@slowly
@given(st.text(min_size=1, max_size=40).filter(lambda t: not any(0xD800 <= ord(c) < 0xE000 for c in t)))
def test_any_unicode_password_gives_a_code_and_so_does_its_normal_form(text: str) -> None:
    code = passwords.derive_code(text)
    assert code.dtype == np.bool_ and code.shape == (16,)
    assert np.array_equal(code, passwords.derive_code(unicodedata.normalize("NFKC", text)))


def test_emoji_and_combined_characters_are_passwords() -> None:
    assert passwords.derive_code("🐴🔋 staple").shape == (16,)
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert np.array_equal(passwords.derive_code(composed), passwords.derive_code(decomposed))


def test_realm_bits_and_password_each_change_the_code() -> None:
    base = passwords.derive_code("correct horse", bits=64)
    others = [
        passwords.derive_code("correct horsf", bits=64),
        passwords.derive_code("correct horse", bits=64, realm="elsewhere"),
        passwords.derive_code("correct horse", bits=128)[:64],
    ]
    # Unrelated codes of 64 bits differ in 32 +- 4 bits.
    assert all(14 < passwords.hamming_distance(base, other) < 50 for other in others)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_workspace_changes_no_code_and_holds_nothing_of_a_password_afterwards(threads: int) -> None:
    workspace = passwords.Workspace()
    for password, bits in (("correct horse", 16), ("🐴", 64), ("x" * 1024, 400)):
        workspace._memory[:] = b"\xff" * len(workspace._memory)
        code = passwords.derive_code(password, bits=bits, workspace=workspace, threads=threads)
        assert np.array_equal(code, passwords.derive_code(password, bits=bits))
        # All of it was used, and wiped.
        assert not np.frombuffer(workspace._memory, np.uint8).any()


def test_threads_that_share_a_workspace_take_turns() -> None:
    workspace = passwords.Workspace()
    words = [f"word {n}" for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda word: passwords.derive_code(word, workspace=workspace), words))
    assert [code.tolist() for code in together] == [passwords.derive_code(word).tolist() for word in words]


@pytest.mark.parametrize("password", ["", "x" * 10_000, "\ud800", None])
def test_unusable_passwords_are_refused_without_quoting_them(password: str) -> None:
    with pytest.raises(InvalidPassword) as caught:
        passwords.derive_code(password)
    shown = "".join(traceback.format_exception(caught.value))
    assert "xxxx" not in shown and "ud800" not in shown


@given(st.lists(st.booleans(), min_size=4, max_size=64), st.data())
def test_codes_invert_measure_and_print_consistently(bits: list[bool], data: st.DataObject) -> None:
    code = np.array(bits)
    assert np.array_equal(passwords.inverse(passwords.inverse(code)), code)
    assert passwords.hamming_distance(code, passwords.inverse(code)) == len(bits)
    assert np.array_equal(passwords.parse_code(passwords.format_code(code)), code)
    flips = data.draw(st.integers(0, len(bits)))
    near = passwords.flip_bits(code, flips, np.random.default_rng(0))
    assert passwords.hamming_distance(code, near) == flips


@pytest.mark.parametrize("text", ["", "01a1", "012", "0 1"])
def test_raw_codes_have_only_zeros_and_ones(text: str) -> None:
    with pytest.raises(InvalidPassword):
        passwords.parse_code(text)


@pytest.mark.parametrize("bits", [0, -4, 6])
def test_a_code_has_a_positive_multiple_of_four_bits(bits: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        passwords.derive_code("x", bits=bits)
