"""Updates: the allow-list, the bytes, and what a receiver refuses."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch import nn

import fedkl
from fedkl.errors import SecretError, UpdateError
from fedkl.update import PublicSchema, PublicUpdate, TensorSpec

SHAPES = {"a.weight": (3, 2), "a.bias": (3,), "empty": (0, 2), "count": ()}


@pytest.fixture
def tensors():
    made = {name: torch.rand(shape) for name, shape in SHAPES.items()}
    return {**made, "count": torch.tensor(7)}


@pytest.fixture
def schema(tensors):
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    return PublicSchema(kind="weights", specs=specs, private=frozenset({"lock.weight"}))


@pytest.fixture
def update(schema, tensors):
    return PublicUpdate(schema=schema, tensors=tensors, num_samples=5, round=2)


@pytest.fixture
def lock():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    lock = fedkl.lock(model, key=fedkl.Key.generate(length=8))
    lock.model(torch.rand(5, 4))
    return lock


def test_bytes_and_back(update, schema):
    again = PublicUpdate.from_bytes(update.to_bytes(), schema=schema)
    assert (again.kind, again.num_samples, again.round) == ("weights", 5, 2)
    assert list(again.tensors) == list(update.tensors)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in update.tensors.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_bytes_in_other_encodings(dtype):
    tensors = {"a": torch.rand(5, 3).to(dtype).T}
    schema = PublicSchema(kind="gradient", specs={"a": TensorSpec.of(tensors["a"])})
    update = PublicUpdate(schema=schema, tensors=tensors, num_samples=1, round=0)
    again = PublicUpdate.from_bytes(update.to_bytes(), schema=schema)
    assert torch.equal(again.tensors["a"], tensors["a"])


def test_an_update_is_frozen_and_a_copy(update, tensors):
    tensors["a.bias"].zero_()
    assert update.tensors["a.bias"].abs().sum() > 0
    with pytest.raises(TypeError):
        update.tensors["more"] = tensors["a.bias"]
    with pytest.raises(AttributeError):
        update.round = 3


def test_a_private_name_is_refused(schema, tensors):
    with pytest.raises(SecretError, match=r"'lock.weight' is private\n.*never from model.parameters\(\)"):
        PublicUpdate(schema=schema, tensors={**tensors, "lock.weight": torch.rand(2)}, num_samples=1, round=0)


def test_all_other_problems_come_together(schema, tensors):
    wrong = {
        "a.weight": tensors["a.weight"].T,
        "a.bias": torch.full((3,), float("nan")),
        "count": tensors["count"].int(),
        "more": torch.rand(1),
    }
    with pytest.raises(UpdateError) as caught:
        PublicUpdate(schema=schema, tensors=wrong, num_samples=1, round=0)
    for message in (
        "'empty' is missing",
        "'more' is unexpected",
        "'a.weight' has shape (2, 3), expected (3, 2)",
        "'a.bias' has non-finite values",
        "'count' has dtype torch.int32, expected torch.int64",
    ):
        assert message in str(caught.value)


@pytest.mark.parametrize("num_samples", [0, -1, float("nan"), 2.5, 3.0, True])
def test_unusable_sample_counts(unchecked, schema, tensors, num_samples):
    with pytest.raises(UpdateError, match=f"expected integers num_samples ≥ 1 .* num_samples={num_samples},"):
        PublicUpdate(schema=schema, tensors=tensors, num_samples=num_samples, round=0)


@pytest.mark.parametrize("round", [-1, float("nan"), 0.5])
def test_unusable_rounds(unchecked, schema, tensors, round):
    with pytest.raises(UpdateError, match=f"and round ≥ 0, got num_samples=1, round={round}"):
        PublicUpdate(schema=schema, tensors=tensors, num_samples=1, round=round)


def test_updates_are_compared_by_identity(update, schema):
    again = PublicUpdate.from_bytes(update.to_bytes(), schema=schema)
    assert update == update
    assert update != again
    assert len({update, again}) == 2


def test_the_repr_shows_no_values_and_no_names(update):
    assert repr(update) == "PublicUpdate(num_samples=5, round=2)"


def test_another_kind_is_refused(update, schema):
    other = PublicSchema(kind="gradient", specs=schema.specs)
    with pytest.raises(UpdateError, match="expected kind 'gradient', got 'weights'"):
        PublicUpdate.from_bytes(update.to_bytes(), schema=other)


def test_a_receiver_trusts_its_own_schema_only(update, schema):
    smaller = PublicSchema(kind="weights", specs={"a.bias": schema.specs["a.bias"]})
    with pytest.raises(UpdateError, match=r"'a.weight' is unexpected"):
        PublicUpdate.from_bytes(update.to_bytes(), schema=smaller)


def test_every_truncation_is_refused(update, schema):
    content = update.to_bytes()
    for length in range(len(content)):
        with pytest.raises(UpdateError):
            PublicUpdate.from_bytes(content[:length], schema=schema)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "fedkl-update-1"},
        {"format": "other", "update": '{"kind": "weights", "num_samples": 1, "round": 0}'},
        {"format": "fedkl-update-1", "update": "["},
        {"format": "fedkl-update-1", "update": "[]"},
        {"format": "fedkl-update-1", "update": "[" * 100_000},
        {"format": "fedkl-update-1", "update": '{"kind": "secret", "num_samples": 1, "round": 0}'},
        {"format": "fedkl-update-1", "update": '{"kind": [], "num_samples": 1, "round": 0}'},
        {"format": "fedkl-update-1", "update": '{"kind": "weights", "num_samples": true, "round": 0}'},
        {"format": "fedkl-update-1", "update": '{"kind": "weights", "num_samples": 1.5, "round": 0}'},
    ],
)
def test_foreign_bytes_are_refused(schema, tensors, metadata):
    content = safetensors.torch.save(tensors, metadata)
    with pytest.raises(UpdateError, match="these are not the bytes of a fedkl-update-1 file"):
        PublicUpdate.from_bytes(content, schema=schema)


def test_hostile_counts_are_refused(schema, tensors):
    header = json.dumps({"kind": "weights", "num_samples": 0, "round": 0})
    content = safetensors.torch.save(tensors, {"format": "fedkl-update-1", "update": header})
    with pytest.raises(UpdateError, match="num_samples=0"):
        PublicUpdate.from_bytes(content, schema=schema)


def test_a_lock_sends_its_state_and_gradient(lock):
    loss = lock.model(torch.rand(3, 4)).square().sum()
    for kind, tensors in (("weights", lock.public_state()), ("gradient", lock.public_gradient(loss))):
        update = lock.public_update(tensors, kind=kind, num_samples=3, round=0)
        receiver = PublicSchema(kind=kind, specs=lock.schema(kind).specs)
        again = PublicUpdate.from_bytes(update.to_bytes(), schema=receiver)
        assert set(again.tensors) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_an_upload_built_from_parameters_is_refused(lock):
    with pytest.raises(SecretError, match=r"parametrizations.weight.original0' is private"):
        lock.public_update(dict(lock.model.named_parameters()), kind="weights", num_samples=1, round=0)


@pytest.mark.parametrize("carry", [torch.float32, torch.float16, torch.bfloat16])
def test_private_content_under_a_public_name_is_refused(carry):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8).to(carry))
    lock = fedkl.lock(model, key=fedkl.Key.generate(length=8))
    state = lock.public_state()
    secret = lock.private_state()["1.parametrizations.weight.original0"]
    state["2.weight"] = secret.to(carry)
    with pytest.raises(SecretError, match=r"'2.weight' has the content of a private tensor") as caught:
        lock.public_update(state, kind="weights", num_samples=1, round=0)
    assert "Send public tensors only" in str(caught.value)
    state["2.weight"] = torch.zeros(8, 8, dtype=carry)
    lock.public_update(state, kind="weights", num_samples=1, round=0)


@pytest.mark.parametrize("secret", ["key", "0.norm.weight", "0.norm.bias", "2.norm.weight", "2.norm.bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_key_and_generated_tensors_under_a_public_name_are_refused(secret, dtype):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)).to(dtype)
    lock = fedkl.lock(model, key=fedkl.Key.generate(length=8), layers="all")
    value = lock.key.reveal().to(dtype) if secret == "key" else None
    owner, _, name = secret.rpartition(".")
    value = getattr(lock.model.get_submodule(owner), name) if value is None else value
    state = {**lock.public_state(), "0.bias": value}
    with pytest.raises(SecretError, match=r"'0.bias' has the content of a private tensor"):
        lock.public_update(state, kind="weights", num_samples=1, round=0)
    lock.public_update(lock.public_state(), kind="weights", num_samples=1, round=0)


def test_a_private_tensor_registered_under_a_public_name_is_refused(lock):
    lock.model.alias = lock.model[1].parametrizations.weight.original0
    uses = (lock.public_state, lock.full_state, lambda: lock.load_public_state({}))
    for use in (*uses, lambda: lock.schema("weights"), lambda: lock.schema("gradient")):
        with pytest.raises(
            SecretError, match=r"'alias' is '1.parametrizations.weight.original0', which is private"
        ):
            use()
