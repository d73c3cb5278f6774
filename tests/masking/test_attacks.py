"""What a server, members and both try; beside most attacks the same with its protection taken out."""

from __future__ import annotations

import pytest
import torch

from fedkl.errors import MaskingError
from fedkl.masking import Call, Mean, opened_mean
from tests.masking.cohorts import RUN, Cohort, drawn, new_cohort


def pairwise_sum(cohort: Cohort, call: Call, *, of: tuple[str, ...]) -> Mean:
    """What the server reads of uploads that are already there or are asked for now."""
    return opened_mean(cohort.summed(call, of=of), layout=cohort.layout, booleans=drawn(0))


def difference(whole: Mean, less: Mean) -> tuple[int, torch.Tensor]:
    """Whose update it is that two sums differ by: its samples and a tensor of it."""
    samples = whole.samples - less.samples
    weight = whole.tensors["weight"].double() * whole.samples - less.tensors["weight"].double() * less.samples
    return samples, weight / samples


def nearly(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model that is another one and trains to the same."""
    return {**model, "bias": model["bias"] + 2.0**-20}


def two_sums_on_nearly_one_model(cohort: Cohort, *, later: Call) -> tuple[Mean, Mean]:
    """A sum of all, then, on nearly the same model, one that the last member is left out of."""
    whole = pairwise_sum(cohort, cohort.call(), of=cohort.names)
    for member in cohort.members.values():
        member.accept_model(RUN, nearly(drawn(1000)))
    return whole, pairwise_sum(cohort, later, of=cohort.names[:-1])


def test_a_server_cannot_send_nearly_the_same_model_for_a_second_sum(monkeypatch):
    later = new_cohort(5).call(round=1)
    with pytest.raises(MaskingError, match="another model"):
        two_sums_on_nearly_one_model(new_cohort(5, mode="pairwise"), later=later)
    monkeypatch.setattr("fedkl.masking.member.check_same_start", lambda *_: None)
    cohort = new_cohort(5, mode="pairwise")
    samples, weight = difference(*two_sums_on_nearly_one_model(cohort, later=later))
    assert samples == cohort.updates["h004"].samples
    assert torch.allclose(weight.float(), cohort.updates["h004"].tensors["weight"], atol=1e-5)


def test_a_server_that_may_change_the_model_gets_one_set_of_names_a_round():
    """It has one stored update masked on two models, and wants a sum of each."""
    cohort = new_cohort(5, mode="pairwise", server_model=True)
    call = cohort.call()
    first = cohort.server(call)
    for upload in cohort.uploads(call).values():
        first.offer(upload)
    for member in cohort.members.values():
        member.accept_model(RUN, nearly(drawn(1000)))
    pairwise_sum(cohort, cohort.call(attempt=1), of=cohort.names[:-1])
    for member in cohort.members.values():
        member.accept_model(RUN, drawn(1000))
    with pytest.raises(MaskingError, match="in this round this member has revealed for other members"):
        cohort.members["h000"].reveal(first.list_for("h000"))
