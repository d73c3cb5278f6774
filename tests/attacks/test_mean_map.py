"""A private first convolution is found together with the images below it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedkl.attacking import observe, trials_of
from fedkl.attacks import Knowledge, MeanMap, PriorOnly, Procedure
from fedkl.attacks.algebraic.access import open_above_first
from fedkl.defenses import Arm, NoDefense, PrivateLayers
from fedkl.errors import AttackError, ConfigError
from tests.attacks.element import ElementLock, correlations, seen_of

QUICK = MeanMap(components=60, steps=30)
STEM = PrivateLayers(layers="stem")


def run(attack, seen):
    generators = [torch.Generator().manual_seed(k) for k in range(len(seen))]
    return attack.reconstruct_many(seen, generators=generators)


@pytest.fixture
def model(small):
    torch.manual_seed(0)
    return small()


@pytest.fixture
def client(images, model):
    torch.manual_seed(3)
    return seen_of(STEM, model, images, trials=5, client=1, prepared_once=True)


def test_the_updates_of_one_client_give_its_images(client):
    seen, trials = client
    assert not any(name.startswith("0.") for name in seen[0].gradient)
    found = run(QUICK, seen)
    ours, floor = correlations(found, trials), correlations(run(PriorOnly(), seen), trials)
    assert float(ours.min()) > 0.9
    assert bool((ours > floor + 0.05).all())
    assert found[0].loss < 0.05


def test_updates_of_one_client_serve_each_other(client):
    seen, trials = client
    together = correlations(run(QUICK, seen), trials)
    alone = correlations(run(QUICK, [replace(each, client=None) for each in seen]), trials)
    few = [replace(each, client=place) for place, each in enumerate(seen[:2])]
    numbered = correlations(run(QUICK, few), trials[:2])
    assert float(together.median()) > float(alone.median())
    torch.testing.assert_close(alone[:2], numbered)
    assert not QUICK.divisible


def test_updates_of_different_clients_do_not_fit_one_stem(images, model, client):
    torch.manual_seed(4)
    mixed, trials = seen_of(STEM, model, images, trials=5, client=1)
    own = client[0][0].auxiliary
    found = run(QUICK, [replace(each, auxiliary=own) for each in mixed])
    assert float(correlations(found, trials).median()) < 0.9
    assert found[0].loss > 5 * run(QUICK, client[0])[0].loss


def test_every_round_has_public_weights_of_its_own(images, small):
    """One client's stem, under two networks above it: each update is gone down through its own."""
    arm = Arm(name="seen", description="", defense=STEM, knowledge=Knowledge(labels=True))
    trials, seen, stem = trials_of(images, trials=4), [], None
    for trial in trials:
        torch.manual_seed(trial.index)
        network = small()
        victim = STEM.prepare(network)
        stem = stem or victim.model[0]
        with torch.no_grad():
            for own, shared in zip(victim.model[0].parameters(), stem.parameters(), strict=True):
                own.copy_(shared)
        seen.append(replace(observe(victim, arm=arm, model=network, trial=trial, classes=10), client=1))
    own = seen_of(STEM, small(), images, trials=1)[0][0].auxiliary
    found = run(QUICK, [replace(each, auxiliary=own) for each in seen])
    assert float(correlations(found, trials).min()) > 0.8


def test_a_client_is_read_alike_in_any_company(images, model):
    """The server draws stems of its own once, not for each client."""
    clients = [seen_of(STEM, model, images, trials=1, client=k)[0][0] for k in range(2)]
    own, drawn = clients[0].auxiliary, []
    draw = lambda: drawn.append(1) or own.draw()  # noqa: E731
    counted = replace(own, draw=draw)
    run(QUICK, [replace(each, auxiliary=counted) for each in clients])
    assert len(drawn) == QUICK.draws


def test_the_fill_in_of_the_stem_is_never_read(client):
    seen, _ = client
    before = run(QUICK, seen[:1])[0].images
    other = [replace(seen[0], model=_zeroed(seen[0].model))]
    torch.testing.assert_close(run(QUICK, other)[0].images, before)


def _zeroed(model):
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    return model


def test_what_it_cannot_read_it_refuses(images, model, client):
    seen = client[0][0]
    plain = seen_of(NoDefense(), model, images, trials=1)[0][0]
    locked = seen_of(
        ElementLock(draw=lambda u, v: (u.exp(), v)), model, images, trials=1
    )[0][0]  # fmt: skip
    cases = {
        "at least 100 auxiliary images": replace(seen, auxiliary=None),
        "several local steps": replace(seen, local=Procedure(steps=2)),
        "expected a private '0'": plain,
        "expected no norm and no lock behind '0'": locked,
    }
    for message, observation in cases.items():
        with pytest.raises(AttackError, match=message):
            run(QUICK, [observation])
    with pytest.raises(ConfigError, match="steps ≥ 1"):
        MeanMap(steps=0)
    with pytest.raises(ConfigError, match="draws ≥ 2"):
        MeanMap(draws=1)
    with pytest.raises(AttackError, match=r"not observed: 0\.weight"):
        open_above_first(seen, attack="Wiener")
