"""Updates: the allow-list, the bytes, and what a receiver refuses."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch import nn

import fedkl
from fedkl.errors import SecretError, UpdateError
from fedkl.update import MAX_SAMPLES, PublicSchema, PublicUpdate, TensorSpec

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


@pytest.mark.parametrize("num_samples", [0, -1, float("nan"), 2.5, 3.0, True, MAX_SAMPLES + 1])
def test_unusable_sample_counts(unchecked, schema, tensors, num_samples):
    with pytest.raises(UpdateError, match=f"of at most 10¹², num_samples ≥ 1 .* num_samples={num_samples},"):
        PublicUpdate(schema=schema, tensors=tensors, num_samples=num_samples, round=0)


@pytest.mark.parametrize("round", [-1, float("nan"), 0.5, 10**12 + 1])
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


def bytes_of(tensors, **counts):
    header = json.dumps({"kind": "weights", "num_samples": 1, "round": 0} | counts)
    return safetensors.torch.save(tensors, {"format": "fedkl-update-1", "update": header})


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": 10**12 + 1}, "num_samples=1000000000001"),
        ({"num_samples": 10**20}, "num_samples=100000000000000000000"),
        ({"num_samples": 10**4000}, "num_samples=more than 30 digits"),
        ({"round": -(10**40)}, "round=more than 30 digits"),
        ({"round": 10**13}, "round=10000000000000"),
    ],
)
def test_hostile_counts_are_refused(schema, tensors, counts, message):
    with pytest.raises(UpdateError, match=message) as caught:
        PublicUpdate.from_bytes(bytes_of(tensors, **counts), schema=schema)
    assert len(str(caught.value)) < 200


def test_no_count_is_too_long_to_be_told(schema, tensors):
    with pytest.raises(UpdateError, match="num_samples=more than 30 digits"):
        PublicUpdate(schema=schema, tensors=tensors, num_samples=10**5000, round=0)


def test_the_most_samples_are_taken(schema, tensors):
    update = PublicUpdate.from_bytes(bytes_of(tensors, num_samples=MAX_SAMPLES, round=10**12), schema=schema)
    assert (update.num_samples, update.round) == (10**12, 10**12)


def raw(header, *, data=bytes(4)):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
OURS = {"format": "fedkl-update-1", "update": '{"kind": "weights", "num_samples": 1, "round": 0}'}


@pytest.mark.parametrize(
    "header",
    [
        *({"w": TENSOR | {"dtype": name, "shape": [4]}, "__metadata__": OURS} for name in ("F8_E8M0", "F99")),
        *({"w": TENSOR, "__metadata__": other} for other in ([], 3, "text", None)),
        *({"w": TENSOR, "__metadata__": OURS | {"update": other}} for other in ({}, 3, None, ["x"])),
        {"w": TENSOR, "__metadata__": {"format": "fedkl-update-1", "update": '{"round": NaN}'}},
        {"w": 3, "__metadata__": OURS},
        [],
    ],
)
def test_headers_of_wrong_kinds_are_refused(header):
    schema = PublicSchema(kind="weights", specs={"w": TensorSpec(shape=(1,), dtype=torch.float32)})
    right = raw({"w": TENSOR, "__metadata__": OURS})
    assert PublicUpdate.from_bytes(right, schema=schema).num_samples == 1
    with pytest.raises(UpdateError, match="these are not the bytes of a fedkl-update-1 file"):
        PublicUpdate.from_bytes(raw(header), schema=schema)


def test_no_name_forges_a_line_or_fills_a_log(schema, tensors):
    names = ["a\nERROR all is lost", "\x1b[2J", "x" * 10_000]
    content = bytes_of(tensors | {name: torch.zeros(1) for name in names})
    with pytest.raises(UpdateError) as caught:
        PublicUpdate.from_bytes(content, schema=schema)
    text = str(caught.value)
    assert r"'a\nERROR all is lost' is unexpected" in text
    assert len(text.splitlines()) == 5
    assert "\x1b" not in text
    assert len(text) < 600


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
