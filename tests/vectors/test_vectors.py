"""Files of earlier versions are read to the same numbers; malformed ones are refused, with the reason."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import fedkl
from fedkl import PublicUpdate, config, modelfile, report
from fedkl.errors import (
    ConfigError,
    FedKLError,
    KeyFileError,
    MaskingError,
    NewerFormatError,
    SecretError,
    UpdateError,
)
from fedkl.federated import Checkpoints
from fedkl.locking import read_lock
from fedkl.masking import Call, Contribution, MemberFile, Rules
from fedkl.masking.exchange import read_card, read_cohort
from fedkl.masking.sums import sum_of
from fedkl.masking.texts import card_values
from tests.federated.setting import everything
from tests.vectors.make import (
    DEFENSE,
    MADE,
    MEMBERS,
    PASSPHRASE,
    RUN,
    digest,
    member_of,
    net,
    secrets_of,
    small_federation,
    text_digest,
    trained,
)

HERE = Path(__file__).parent
FIRST, SECOND, THIRD, FOURTH = (HERE / f"generation-{number}" for number in (1, 2, 3, 4))
MALFORMED = HERE / "malformed"
GOOD = json.loads((FIRST / "good.json").read_text())
INDEX = json.loads((MALFORMED / "index.json").read_text())
REFUSALS: dict[str, tuple[type[FedKLError], ...]] = {
    "key": (KeyFileError, NewerFormatError),
    "plainkey": (KeyFileError,),
    "lock": (KeyFileError,),
    "update": (UpdateError, SecretError),
    "config": (ConfigError,),
}


def of_kind(suffix: str) -> list[str]:
    return [name for name in GOOD if name.endswith(suffix)]


def lock_digest(saved) -> str:
    return digest({**saved.lock.private_state(), **saved.memory, "key": saved.lock.key.reveal()})


def test_every_vector_is_in_an_index():
    assert {path.name for path in FIRST.iterdir()} == {*GOOD, "good.json"}
    assert {path.name for path in MALFORMED.iterdir()} == {*INDEX, "index.json"}


@pytest.mark.parametrize("name", of_kind(".key"))
def test_keys(name):
    key = fedkl.load_key(FIRST / name, passphrase=PASSPHRASE if "encrypted" in name else None)
    assert digest({"key": key.reveal()}) == GOOD[name]
    assert name.startswith(key.distribution)


@pytest.mark.parametrize("name", of_kind(".lock"))
def test_locks(name):
    saved = read_lock(FIRST / name, net(), passphrase=PASSPHRASE)
    assert lock_digest(saved) == GOOD[name]
    assert saved.about == {}
    assert saved.lock.model(torch.rand(3, 4)).isfinite().all()


@pytest.mark.parametrize("name", of_kind(".update"))
def test_updates(name):
    lock: nn.Module = fedkl.lock(net(), key=fedkl.Key.generate(length=8))
    schema = lock.schema(name.removesuffix(".update"))
    update = PublicUpdate.from_bytes((FIRST / name).read_bytes(), schema=schema)
    assert digest(update.tensors) == GOOD[name]
    assert (update.num_samples, update.round) == (8, 3)


def test_a_checkpoint(tmp_path):
    shutil.copytree(FIRST / "checkpoint", tmp_path / "checkpoint")
    run = small_federation()
    assert Checkpoints(tmp_path / "checkpoint", passphrase=PASSPHRASE).restore(run) == 2
    assert digest(everything(run)) == GOOD["checkpoint"]
    run.run_round(2)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Flower needs Python 3.11")
def test_the_rounds_of_a_flower_server():
    from fedkl.flower.round_files import RoundFiles

    files = RoundFiles(FIRST / "rounds")
    saved = files.newest()
    assert saved is not None
    assert saved.round == 2
    assert digest({**saved.arrays, **saved.memory}) == GOOD["rounds"]
    assert files.history(until=1) == {"train_metrics_clientapp": {1: {"loss": 2.5}}}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Flower needs Python 3.11")
def test_the_store_of_a_flower_node(tmp_path):
    from fedkl.flower import ClientStore

    shutil.copytree(SECOND / "store", tmp_path / "store")
    with ClientStore(tmp_path / "store", passphrase=PASSPHRASE).client(
        "ward-3", model=net(), defense=DEFENSE
    ) as client:
        assert client.ledger.saved == 2
        tensors = {**client.lock.private_state(), **client.memory, "key": client.lock.key.reveal()}
        assert digest(tensors) == json.loads((SECOND / "good.json").read_text())["store"]


def test_a_model_file_and_the_lock_that_goes_with_it():
    good, path = json.loads((THIRD / "good.json").read_text()), THIRD / "model.safetensors"
    assert digest(modelfile.read_model(path)) == good[path.name]
    lock = fedkl.load_lock(THIRD / "client.lock", net(), passphrase=PASSPHRASE, public=path)
    found = lock.model.eval()(torch.linspace(-1, 1, 20).reshape(5, 4)).detach()
    torch.testing.assert_close(found, torch.tensor(good["output"]))


@pytest.fixture
def members(tmp_path):
    shutil.copytree(FOURTH, tmp_path / "members")
    return tmp_path / "members"


FOURTH_GOOD = json.loads((FOURTH / "good.json").read_text())


def test_every_vector_of_members_is_in_the_index():
    assert {path.name for path in FOURTH.iterdir()} == {*FOURTH_GOOD, "good.json"}


def test_a_members_card_and_its_cohort():
    card, sealed = read_card(FOURTH / "ward-a.member"), read_cohort(FOURTH / "study.cohort")
    assert text_digest(card_values(card)) == FOURTH_GOOD["ward-a.member"]
    roster = sealed.roster
    assert f"{roster.digest.hex()} {roster.fingerprint}" == FOURTH_GOOD["study.cohort"]
    assert card in roster.cards
    roster.check_date(MADE)
    assert roster.members == MEMBERS
    assert roster.rules == Rules(mode="both", max_samples=1000)


def test_a_members_secret_file_and_its_memory(members):
    with MemberFile.open(members / "ward-a.secret", passphrase=PASSPHRASE) as file:
        assert digest(secrets_of(file)) == FOURTH_GOOD["ward-a.secret"]
        assert file.keys.card() == read_card(members / "ward-a.member")
        sealed = read_cohort(members / "study.cohort")
        assert file.is_joined(sealed)
        assert sealed.opened(file.keys).secret.reveal() == file.membership().secret.reveal()
        assert text_digest(file.memory().to_json()) == FOURTH_GOOD["ward-a.memory"]
        member = member_of(file.membership(), file.memory())
        call = Call(run=RUN, round=0, attempt=0, cohort=MEMBERS)
        with pytest.raises(MaskingError, match="used up"):
            member.upload(call, Contribution(tensors=trained(1), samples=1, metrics={"loss": 0.25}))


def test_a_member_opens_a_sum_that_an_earlier_version_gave(members):
    """Its keys, masks and tags are those of protocol 1."""
    total = sum_of(safetensors.torch.load_file(members / "study.sum"))
    with MemberFile.open(members / "ward-a.secret", passphrase=PASSPHRASE) as file:
        member = member_of(file.membership(), file.memory())
        mean = member.open(total)
        again = member.upload(
            Call(run=RUN, round=1, attempt=0, cohort=MEMBERS),
            Contribution(tensors=trained(1), samples=1, metrics={"loss": 0.25}),
        )
    assert digest(mean.tensors) == FOURTH_GOOD["study.sum"]
    assert (mean.samples, mean.metrics["loss"]) == (6, pytest.approx((1 + 4 + 9) / 24))
    assert torch.equal(mean.tensors["weight"], trained(0)["weight"] + torch.tensor(14 / 6))
    assert again.model != total.model


@pytest.mark.parametrize("name", ["train", "attack"])
def test_runs(tmp_path, name):
    shutil.copytree(FIRST / name, tmp_path / name)
    built = report.build(tmp_path / name)
    assert built.html.exists()
    assert built.tables


def use(kind: str, path: Path) -> None:
    if kind == "config":
        config.load(path)
    elif kind == "update":
        lock = fedkl.lock(net(), key=fedkl.Key.generate(length=8))
        PublicUpdate.from_bytes(path.read_bytes(), schema=lock.schema("weights"))
    elif kind == "lock":
        fedkl.load_lock(path, net(), passphrase=PASSPHRASE)
    else:
        fedkl.load_key(path, passphrase=PASSPHRASE if kind == "key" else None)


@pytest.mark.parametrize("name", INDEX)
def test_malformed_files_are_refused(unchecked, name):
    kind, says = INDEX[name]["kind"], INDEX[name]["says"]
    with pytest.raises(REFUSALS[kind]) as caught:
        use(kind, MALFORMED / name)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 2000
