import math

import pytest
import torch
from pydantic import TypeAdapter

from fedkl.data import IID, AnyPartition, Dirichlet, Partition, Shards, class_counts
from fedkl.errors import ConfigError, DataError

SCHEMES = [IID(), Shards(), Shards(per_client=1), Dirichlet(), Dirichlet(alpha=0.1, min_samples=5)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def labels_of(samples, classes=10):
    return torch.randint(classes, (samples,), generator=generator(9))


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize(("samples", "clients"), [(60, 1), (61, 3), (2000, 7), (1000, 20)])
def test_every_sample_is_used_once_and_no_client_is_without(scheme, samples, clients):
    parts = scheme.split(labels_of(samples), clients=clients, generator=generator())
    assert isinstance(scheme, Partition)
    assert len(parts) == clients
    assert min(len(part) for part in parts) >= getattr(scheme, "min_samples", 1)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(samples))
    for part in parts:
        assert part.dtype == torch.int64
        assert part.untyped_storage().nbytes() == 8 * len(part)  # nobody carries the indexes of another


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_the_generator_alone_decides(scheme):
    labels = labels_of(500)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = scheme.split(labels, clients=4, generator=generator(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same = scheme.split(labels, clients=4, generator=generator(3))
    other = scheme.split(labels, clients=4, generator=generator(4))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a.sort()[0], b.sort()[0]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("samples", "clients"), [(1, 1), (10, 3), (10, 10), (2000, 7), (101, 100)])
def test_iid_sizes_differ_by_at_most_one(samples, clients):
    sizes = [len(p) for p in IID().split(labels_of(samples), clients=clients, generator=generator())]
    assert max(sizes) - min(sizes) <= 1


def test_iid_shuffles():
    (only,) = IID().split(labels_of(1000), clients=1, generator=generator())
    assert not torch.equal(only, torch.arange(1000))


def test_shards_are_runs_of_sorted_labels_as_published():
    labels = torch.arange(6000) % 10
    parts = Shards().split(labels, clients=100, generator=generator())
    shards = {tuple(run.tolist()) for run in labels.argsort(stable=True).split(30)}
    assert [len(part) for part in parts] == [60] * 100
    assert {tuple(half.tolist()) for part in parts for half in part.split(30)} == shards
    counts = class_counts(labels, parts, classes=10)
    assert int((counts > 0).sum(1).max()) == 2
    assert counts.sum(0).tolist() == [600] * 10


def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution():
    # A share of Dir(alpha, …) over k clients is Beta(alpha, (k − 1) alpha).
    labels, alpha, clients = torch.arange(40_000) % 200, 0.5, 4
    parts = Dirichlet(alpha=alpha).split(labels, clients=clients, generator=generator())
    shares = class_counts(labels, parts, classes=200).double() / 200
    assert shares.mean(1).tolist() == pytest.approx([1 / clients] * clients, abs=0.06)
    variance = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert float(shares.var()) == pytest.approx(variance, rel=0.1)


def test_a_smaller_alpha_makes_clients_differ_more():
    labels = labels_of(5000)

    def spread(alpha):
        parts = Dirichlet(alpha=alpha).split(labels, clients=5, generator=generator())
        counts = class_counts(labels, parts, classes=10).double()
        return float((counts / counts.sum(0)).std(0).mean())

    assert spread(0.1) > 1.5 * spread(1.0) > 3 * spread(100.0)


def test_a_tiny_alpha_still_gives_finite_shares():
    parts = Dirichlet(alpha=1e-3).split(labels_of(2000, 100), clients=5, generator=generator())
    assert sum(map(len, parts)) == 2000


def test_dirichlet_gives_up_with_a_remedy():
    with pytest.raises(DataError, match=r"none of 1000 draws with alpha=0.01 .*Raise alpha, or lower min"):
        Dirichlet(alpha=0.01, min_samples=9).split(labels_of(100), clients=10, generator=generator())


@pytest.mark.parametrize(
    ("scheme", "samples", "clients", "most"),
    [
        (IID(), 10, 0, 10),
        (IID(), 10, -1, 10),
        (IID(), 10, 11, 10),
        (IID(), 0, 1, 0),
        (Shards(per_client=3), 10, 4, 3),
        (Dirichlet(min_samples=5), 10, 3, 2),
    ],
)
def test_a_number_of_clients_that_does_not_fit_is_an_error(scheme, samples, clients, most):
    message = f"{type(scheme).__name__}: expected 1 to {most} clients .*got {clients}"
    with pytest.raises(DataError, match=message):
        scheme.split(labels_of(samples), clients=clients, generator=generator())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shards(per_client=0), "Shards: expected per_client ≥ 1, got per_client=0"),
        (lambda: Dirichlet(alpha=0.0), "expected a finite alpha > 0 .*alpha=0.0"),
        (lambda: Dirichlet(alpha=-1.0), "alpha=-1.0"),
        (lambda: Dirichlet(alpha=math.nan), "alpha=nan"),
        (lambda: Dirichlet(alpha=math.inf), "alpha=inf"),
        (lambda: Dirichlet(min_samples=0), "min_samples=0"),
    ],
)
def test_settings_out_of_range_are_errors(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_a_scheme_survives_a_configuration_file(scheme):
    adapter = TypeAdapter(AnyPartition)
    assert adapter.validate_python(adapter.dump_python(scheme, mode="json")) == scheme


def test_class_counts_agree_with_a_loop():
    labels = labels_of(300, 7)
    parts = Dirichlet().split(labels, clients=3, generator=generator())
    expected = [[int((labels[part] == label).sum()) for label in range(8)] for part in parts]
    assert class_counts(labels, parts, classes=8).tolist() == expected
