"""The search for private numbers: finds what it says, wherever it stands, and raises no false alarm."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkl.secret_search import SecretSearch
from tests.locking.leaks import ENCODINGS

numbers = st.lists(st.floats(-4, 4, width=32).map(lambda x: x + 8.5), min_size=6, max_size=12, unique=True)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KEY = random(1024, seed=1).double() / 32
WEIGHT = random(12, 64, seed=2)


@pytest.fixture(scope="module")
def search():
    return SecretSearch([KEY, WEIGHT, torch.ones(9), torch.tensor(7)])


@settings(max_examples=60)
@given(numbers, st.integers(0, 40), st.sampled_from(ENCODINGS), st.booleans())
def test_secrets_are_found_at_any_place_in_any_precision(values, place, kind, negative):
    secret = torch.tensor(values, dtype=torch.float64) * (-1 if negative else 1)
    rounded = secret.to(kind)
    if len(set(rounded.tolist())) < len(secret):
        return  # too coarse to be told from chance
    search = SecretSearch([secret])
    message = random(60)
    assert not search.in_numbers(message)
    message[place : place + len(secret)] = rounded.float()
    assert search.in_numbers(message)
    assert search.in_bytes(b"abc" + rounded.view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("secret", [torch.ones(9), torch.zeros(9), torch.tensor(4), torch.tensor([1.0, 2.0])])
def test_constants_and_counts_are_no_secrets(secret):
    assert not SecretSearch([secret]).in_numbers(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 2.0]))


@pytest.mark.parametrize("start", range(0, 1024 - 7, 31))
def test_any_slice_of_seven_numbers(search, start):
    message = random(40)
    message[9:16] = KEY[start : start + 7].float()
    assert search.in_numbers(message)
    message[12] = 0  # what remains is three and three
    assert not search.in_numbers(message)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_any_slice_of_eleven_numbers_in_half_precision(search, kind):
    found = []
    for start in range(0, 1000, 61):
        message, part = random(40).to(kind), KEY[start : start + 11].to(kind)
        if len(set(part.abs().tolist())) == 11:
            message[9:20] = part
            found.append(search.in_numbers(message))
    assert len(found) > 5
    assert all(found)


def npz(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


PART = KEY[100:140]
SINGLE = PART.float().numpy()
FOUND = {
    "a column": lambda s: s.in_numbers(WEIGHT[:, 3].contiguous()),
    "transposed": lambda s: s.in_numbers(WEIGHT.T.contiguous()),
    "without signs": lambda s: s.in_numbers(PART.abs()),
    "other byte order": lambda s: s.in_bytes(b"x" + SINGLE.astype(">f4").tobytes()),
    "double, other byte order": lambda s: s.in_bytes(b"xyz" + PART.numpy().astype(">f8").tobytes()),
    "npy file": lambda s: s.in_bytes(npz(SINGLE)),
    "struct": lambda s: s.in_bytes(struct.pack("<3x40d", *PART.tolist())),
    "list": lambda s: s.in_list(PART.tolist()),
    "list of six digits": lambda s: s.in_list([float(f"{x:.6g}") for x in PART.tolist()]),
    "list of three digits": lambda s: s.in_list([float(f"{x:.3g}") for x in PART.tolist()]),
    "list behind others": lambda s: s.in_list([1.0, 2.5, 3.5, *PART.tolist()]),
    "bytes as numbers": lambda s: s.in_list(list(SINGLE.tobytes())),
    "words as numbers": lambda s: s.in_list(SINGLE.view(np.int32).tolist()),
    "long words as numbers": lambda s: s.in_list(PART.numpy().view(np.int64).tolist()),
    "repr": lambda s: s.in_text(repr(PART.tolist())),
    "print of a tensor": lambda s: s.in_text(str(PART)),
    "json": lambda s: s.in_text(json.dumps({"gamma": [round(x, 6) for x in PART.tolist()]})),
    "csv": lambda s: s.in_text(";".join(f"{x:.4e}" for x in PART.tolist())),
    "base64": lambda s: s.in_text("data:" + base64.b64encode(SINGLE.tobytes()).decode()),
    "base64 for addresses": lambda s: s.in_text("a" + base64.urlsafe_b64encode(SINGLE.tobytes()).decode()),
    "hexadecimal": lambda s: s.in_text("0x" + SINGLE.tobytes().hex()),
    "latin-1": lambda s: s.in_text(SINGLE.tobytes().decode("latin-1")),
}


@pytest.mark.parametrize("found", FOUND.values(), ids=FOUND)
def test_what_is_found(search, found):
    assert found(search)


MISSED = {
    "three numbers": lambda s: s.in_numbers(KEY[100:103]),
    "a multiple": lambda s: s.in_numbers(3 * KEY),
    "a sum": lambda s: s.in_numbers(KEY + 1),
    "every second number": lambda s: s.in_numbers(KEY[::2].contiguous()),
    "backwards": lambda s: s.in_numbers(KEY.flip(0)),
    "two digits": lambda s: s.in_list([float(f"{x:.2g}") for x in KEY.tolist()]),
    "base85": lambda s: s.in_text(base64.b85encode(SINGLE.tobytes()).decode()),
    "compressed": lambda s: s.in_bytes(zlib.compress(repr(KEY.tolist()).encode())),
}


@pytest.mark.parametrize("missed", MISSED.values(), ids=MISSED)
def test_what_is_not_found_as_the_docs_say(search, missed):
    assert not missed(search)


def test_many_secrets_raise_no_false_alarm():
    search = SecretSearch([random(64, seed=n) for n in range(60)])
    message = random(200_000, seed=99)
    message[::7] = 0
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        assert not search.in_numbers(message.to(kind))
    assert not search.in_bytes(message[:20_000].numpy().tobytes())
    assert not search.in_list(message[:2_000].tolist())
    assert not search.in_text(json.dumps([round(x, 3) for x in message[:2_000].tolist()]))
    assert not search.in_list(list(range(2_000)))


@pytest.mark.parametrize("odd", [[], [1.0], [float("nan")] * 20, [float("inf"), 1e300, 10**400, -1, True, 0]])
def test_odd_lists(search, odd):
    assert not search.in_list(odd)


def test_nothing_is_found_by_a_search_for_nothing():
    assert not SecretSearch([]).in_numbers(random(100))
    assert not SecretSearch([torch.tensor([]), torch.full((9,), torch.nan)]).in_numbers(
        torch.full((9,), torch.nan)
    )


def test_every_run_of_a_small_tensor_is_found():
    """Of large ones every fourth run is remembered, so that it takes seven numbers in a row; here four do."""
    secret = torch.randn(64, generator=torch.Generator().manual_seed(0))
    search = SecretSearch([secret])
    message = torch.randn(50, generator=torch.Generator().manual_seed(1))
    assert not search.in_numbers(message)
    for first in range(60):
        message[20:24] = secret[first : first + 4]
        assert search.in_numbers(message), first
