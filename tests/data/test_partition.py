import pytest
import torch

from fedkl.data import partition_iid
from fedkl.errors import DataError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("samples", "clients"), [(1, 1), (10, 3), (10, 10), (2000, 7), (60, 60), (101, 100)])
def test_every_sample_is_used_once_and_sizes_differ_by_at_most_one(samples, clients):
    parts = partition_iid(samples, clients=clients, generator=generator())
    sizes = [len(part) for part in parts]
    assert len(parts) == clients
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(samples))
    assert all(part.dtype == torch.int64 for part in parts)


def test_the_generator_alone_decides():
    torch.manual_seed(1)
    first = partition_iid(100, clients=4, generator=generator(3))
    torch.manual_seed(2)
    same = partition_iid(100, clients=4, generator=generator(3))
    other = partition_iid(100, clients=4, generator=generator(4))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    partition_iid(100, clients=4, generator=generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_are_shuffled():
    (only,) = partition_iid(1000, clients=1, generator=generator())
    assert not torch.equal(only, torch.arange(1000))


def test_no_client_carries_the_indexes_of_another():
    for part in partition_iid(12, clients=3, generator=generator()):
        assert part.untyped_storage().nbytes() == 8 * len(part)


@pytest.mark.parametrize(("samples", "clients"), [(10, 0), (10, -1), (10, 11), (0, 1)])
def test_a_number_of_clients_that_does_not_fit_is_an_error(samples, clients):
    with pytest.raises(DataError, match=f"expected 1 to {samples} clients .*got {clients}"):
        partition_iid(samples, clients=clients, generator=generator())
