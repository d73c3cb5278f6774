"""The search for private numbers: finds them wherever they stand, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkl.flower.private_numbers import PrivateNumbers
from tests.locking.leaks import ENCODINGS

numbers = st.lists(st.floats(-4, 4, width=32).map(lambda x: x + 8.5), min_size=4, max_size=12, unique=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(numbers, st.integers(0, 40), st.sampled_from(ENCODINGS), st.booleans())
def test_secrets_are_found_at_any_place_in_any_precision(values, place, kind, leading_zero):
    secret = torch.tensor([0.0, *values] if leading_zero else values, dtype=torch.float64)
    rounded = secret.to(kind)
    if len(set(rounded.tolist())) < len(secret):
        return  # too coarse to be told from chance
    search = PrivateNumbers([secret])
    message = torch.randn(60, generator=torch.Generator().manual_seed(0))
    assert not search.in_numbers(message)
    message[place : place + len(secret)] = rounded.float()
    assert search.in_numbers(message)
    assert search.in_bytes(b"abc" + rounded.view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("secret", [torch.ones(9), torch.zeros(9), torch.tensor(4), torch.tensor([1.0, 2.0])])
def test_constants_and_counts_are_no_secrets(secret):
    assert not PrivateNumbers([secret]).in_numbers(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 2.0]))


def test_many_secrets_raise_no_false_alarm():
    generator = torch.Generator().manual_seed(0)
    secrets = [torch.randn(64, generator=generator) for _ in range(60)]
    message = torch.randn(200_000, generator=generator)
    message[::7] = 0
    assert not PrivateNumbers(secrets).in_numbers(message)
    assert not PrivateNumbers(secrets).in_numbers(message.bfloat16())
