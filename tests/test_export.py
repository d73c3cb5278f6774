"""The trained model gets out of a run directory: real trainings, their clients' accuracy, and refusals."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import safetensors.torch
import torch
from torch import nn

import fedkl
from fedkl import cli, experiments, models
from fedkl import training as trainings
from fedkl.aggregation.masked import MaskedAggregation
from fedkl.config import AttackConfig, CheckpointConfig, DataConfig, ModelConfig, TrainConfig
from fedkl.configured import dataset_of
from fedkl.defenses import KeyLock, NoDefense, PrivateLayers, PrivateNorm
from fedkl.defenses.noise import GaussianNoise
from fedkl.defenses.precode import PRECODE
from fedkl.errors import ConfigError, FedKLError, KeyFileError, UpdateError
from fedkl.export import client_of, export
from fedkl.federated import ConstantSchedule, FederatedTraining, LocalTraining
from fedkl.locking import recalibrate_norms_
from fedkl.metrics import evaluate
from fedkl.modelfile import read_model
from fedkl.models.registry import MODELS, ModelEntry
from fedkl.parsing import parse_tensors
from fedkl.runs import RunDirectory

PASSPHRASE = "correct horse"
LOCAL = LocalTraining(batch_size=16, lr=0.05, epochs=4)
CONFIG = TrainConfig(
    data=DataConfig(train_images=450, test_images=120),
    model=ModelConfig(name="two-norms", standardize=True),
    defense=KeyLock(key_length=16),
    training=FederatedTraining(clients=3, rounds=2, schedule=ConstantSchedule(), local=LOCAL),
    checkpoints=CheckpointConfig(seconds=0),
    auxiliary=20,
)
DEFENSES = {
    "none": NoDefense(),
    "keylock": CONFIG.defense,
    "all": KeyLock(key_length=16, layers="all"),
    "private-layers": PrivateLayers(),
    "private-norm": PrivateNorm(like=KeyLock(key_length=16)),
    "noise": GaussianNoise(deviation=1e-3),
    "precode": PRECODE(size=16),
}
LOCKED = ("keylock", "all")


class Small(nn.Module):
    """It learns digits in seconds; its first norm is locked."""

    def __init__(self, channels, classes):
        super().__init__()
        body = [nn.Conv2d(channels, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU()]
        head = [nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(200, classes)]
        self.body = nn.Sequential(*body, *head)

    def forward(self, images):
        return self.body(images)


@pytest.fixture(scope="module", autouse=True)
def _setting():
    """The small network is in the zoo, images are read once, and the server's own models are left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "two-norms", ModelEntry(info="for tests", size=32, build=Small))
        patch.setattr(trainings, "server_fill_ins", lambda **options: [])
        patch.setattr(trainings, "dataset_of", lambda config: images())
        patch.setenv("FEDKL_PASSPHRASE", PASSPHRASE)
        yield


def trained(folder, *, defense=CONFIG.defense, **training):
    config = CONFIG.model_copy(update={"defense": defense})
    options = {**config.training.__dict__, **training}
    config = config.model_copy(update={"training": FederatedTraining(**options)})
    return experiments.run(config, out=folder).path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Makes the training of a name once."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(name):
        kind, _, mode = name.partition("/")
        options = {"aggregation": MaskedAggregation(mode=mode)} if mode else {}
        return trained(folder / name.replace("/", "-"), defense=DEFENSES[kind], **options)

    return run


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the locked training, to be damaged."""
    return shutil.copytree(runs("keylock"), tmp_path / "run")


@functools.cache
def images():
    return dataset_of(CONFIG.data)


def network():
    """As a user builds it again, with weights of its own."""
    spec = images().spec
    normalization = (spec.mean, spec.std)
    return models.build_model("two-norms", channels=3, classes=10, seed=99, normalization=normalization)


def accuracy(model):
    dataset = images()
    return evaluate(model, dataset.test_images, dataset.test_labels)


def logits(model):
    with torch.no_grad():
        return model.eval()(images().test_images[:20])


def same(one, other):
    """Whether two model files hold the same; their bytes may differ in the order of the metadata."""
    (a, about), (b, of_b) = (parse_tensors(path.read_bytes()) for path in (one, other))
    return about == of_b and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def recorded(run):
    return RunDirectory.open(run).summary["accuracies"]


@pytest.mark.parametrize("name", ["keylock", "all", "keylock/blind", "keylock/pairwise"])
def test_a_clients_model_is_worth_what_the_run_recorded(runs, tmp_path, name):
    run = runs(name)
    for client, expected in recorded(run).items():
        done = export(run, out=tmp_path / client / "model.safetensors", client=client)
        assert (done.rounds, done.lock, done.whole) == (2, tmp_path / client / f"{client}.lock", False)
        assert done.read_by_server == (not name.endswith("blind"))
        lock = fedkl.load_lock(done.lock, network(), passphrase=PASSPHRASE, public=done.model)
        assert accuracy(lock.model) == pytest.approx(expected, abs=1e-9)
        assert torch.equal(logits(lock.model), logits(client_of(run, client).model))
    assert min(recorded(run).values()) > 0.5, "it must have learned something, or this shows nothing"
    other = fedkl.load_lock(done.lock, network(), passphrase=PASSPHRASE)
    assert accuracy(other.model) < 0.5, "a lock without the public tensors is not the client's model"


def test_a_client_that_nobody_evaluated_has_statistics_of_the_exported_weights(tmp_path):
    run = trained(tmp_path / "run", eval_clients=1)
    assert len(recorded(run)) == 1
    federation, _ = trainings.restored(RunDirectory.open(run))
    for client in federation.clients:
        before = client.private_state
        split = client_of(run, client.name)
        expected = CONFIG.defense.prepare(network())
        client.enter(expected, split.public_state())
        recalibrate_norms_(expected, images().train_images[client.samples])
        own, stored = split.private_state(), client.name in recorded(run)
        assert all(torch.equal(tensor, own[name]) for name, tensor in expected.private_state().items())
        assert all(torch.equal(tensor, before[name]) for name, tensor in own.items()) == stored


def test_kept_statistics_are_exported_as_they_are(tmp_path):
    run = trained(tmp_path / "run", norm_statistics="kept")
    federation, _ = trainings.restored(RunDirectory.open(run))
    for client in federation.clients:
        own = client_of(run, client.name).private_state()
        assert all(torch.equal(tensor, own[name]) for name, tensor in client.private_state.items())


@pytest.mark.parametrize("name", ["keylock", "all"])
def test_the_public_tensors_alone_are_those_beside_the_lock(runs, tmp_path, name):
    alone = export(runs(name), out=tmp_path / "alone")
    beside = export(runs(name), out=tmp_path / "beside", client="client-1")
    assert (alone.rounds, alone.lock) == (2, None)
    assert same(alone.model, beside.model)
    tensors, about = parse_tensors(alone.model.read_bytes())
    assert about == {"format": "fedkl-model-1", "kind": "public", "rounds": "2"}
    split = client_of(runs(name), "client-1")
    assert tensors.keys() == split.public_state().keys()
    assert not tensors.keys() & split.private_names


@pytest.mark.parametrize("name", ["none", "noise", "none/blind", "none/pairwise"])
def test_without_private_tensors_the_public_ones_are_the_model(runs, tmp_path, name):
    run = runs(name)
    done = export(run, out=tmp_path / "model.safetensors")
    assert done.whole
    model = network()
    model.load_state_dict(safetensors.torch.load_file(done.model))
    for expected in recorded(run).values():
        assert accuracy(model) == pytest.approx(expected, abs=1e-9)
    assert accuracy(model) > 0.5
    with pytest.raises(
        ConfigError, match=r"no locks\. They keep nothing: the public tensors are their model"
    ):
        export(run, out=tmp_path / "other", client="client-0")


@pytest.mark.parametrize("name", ["private-layers", "private-norm"])
def test_clients_that_keep_tensors_without_a_lock(runs, tmp_path, name):
    run = runs(name)
    assert export(run, out=tmp_path / "model").whole is False
    with pytest.raises(ConfigError, match=r"no locks. In Python, fedkl\.export\.client_of"):
        export(run, out=tmp_path / "other", client="client-0")
    assert not (tmp_path / "other").exists()
    for client, expected in recorded(run).items():
        split = client_of(str(run), client)
        assert not split.model.training
        assert accuracy(split.model) == pytest.approx(expected, abs=1e-9)


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stopped(run):
    """As if the training had been killed after its last checkpoint."""
    for name in ("summary.json", "global.safetensors"):
        (run / name).unlink()
    return run


def test_nothing_in_the_run_changes(run, tmp_path):
    before = content(run)
    export(run, out=tmp_path / "model", client="client-0")
    (run / "checkpoints" / "round-000002.json").write_text("damaged")
    (run / "checkpoints" / "public-000009.safetensors").write_text("left by a killed write")
    with pytest.warns(UserWarning, match="of round 1, is used instead"):
        export(run, out=tmp_path / "earlier" / "model", client="client-0")
    changed = {name for name, data in content(run).items() if before.get(name) != data}
    assert {name.name for name in changed} == {"round-000002.json", "public-000009.safetensors"}
    assert before.keys() <= content(run).keys()


def test_a_stopped_training_gives_its_last_checkpoint(run, runs, tmp_path):
    whole = export(runs("keylock"), out=tmp_path / "whole")
    done = export(stopped(run), out=tmp_path / "model")
    assert done.rounds == 2
    assert same(done.model, whole.model)
    (run / "checkpoints" / "public-000002.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="The checkpoint before it, of round 1, is used instead"):
        assert export(run, out=tmp_path / "earlier").rounds == 1
    assert not same(tmp_path / "earlier", whole.model)


def with_nan(path):
    tensors = safetensors.torch.load_file(path)
    tensors["body.0.weight"][0] = float("nan")
    path.write_bytes(safetensors.torch.save(tensors))


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.unlink(), lambda path: path.write_bytes(b"x"), with_nan],
    ids=["gone", "damaged", "NaN"],
)
def test_a_damaged_result_gives_way_to_the_checkpoint(run, runs, tmp_path, damage):
    damage(run / "global.safetensors")
    with pytest.warns(UserWarning, match="The checkpoint of round 2 is used instead"):
        done = export(run, out=tmp_path / "model")
    assert same(done.model, export(runs("keylock"), out=tmp_path / "whole").model)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(FedKLError, match=r"global\.safetensors|non-finite"):
        export(run, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_finished_run_without_its_checkpoints_has_its_public_tensors_still(run, tmp_path):
    shutil.rmtree(run / "checkpoints")
    assert export(run, out=tmp_path / "model").rounds == 2
    with pytest.raises(ConfigError, match="no checkpoint here"):
        export(run, out=tmp_path / "other", client="client-0")


def test_a_training_that_has_not_begun(tmp_path):
    RunDirectory.create(tmp_path / "run", config=CONFIG, version="0")
    with pytest.raises(ConfigError, match="nothing is trained here yet"):
        export(tmp_path / "run", out=tmp_path / "model")
    with pytest.raises(ConfigError, match="no checkpoint here"):
        export(tmp_path / "run", out=tmp_path / "model", client="client-0")


def test_another_passphrase_opens_no_client(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKL_PASSPHRASE", "another horse")
    with pytest.raises(KeyFileError, match="wrong passphrase"):
        export(run, out=tmp_path / "model", client="client-0")
    assert export(run, out=tmp_path / "model").rounds == 2, "the public tensors take none"


@pytest.mark.parametrize("client", ["client-3", "../client-0", "a\nb", "", "client-0.lock"])
def test_there_is_no_such_client(runs, tmp_path, client):
    with pytest.raises(ConfigError, match="Choose one from client-0 to client-2") as caught:
        export(runs("keylock"), out=tmp_path / "model", client=client)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_files_that_are_there_are_replaced_only_where_that_is_meant(runs, tmp_path):
    out, lock = tmp_path / "model", tmp_path / "client-0.lock"
    lock.write_text("precious")
    with pytest.raises(ConfigError, match=r"client-0\.lock: exists already"):
        export(runs("keylock"), out=out, client="client-0")
    assert not out.exists()
    export(runs("keylock"), out=out)
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="model: exists already"):
        export(runs("all"), out=out)
    assert (out.read_bytes(), lock.read_text()) == (before, "precious")
    export(runs("all"), out=out, client="client-0", replace=True)
    assert out.read_bytes() != before
    assert lock.read_bytes().startswith(b"FEDKLSEC")
    with pytest.raises(ConfigError, match="the client's lock has this name"):
        export(runs("keylock"), out=lock, client="client-0", replace=True)


def test_of_another_network_they_are_refused(runs, tmp_path):
    done = export(runs("all"), out=tmp_path / "model", client="client-0")
    other = export(runs("keylock"), out=tmp_path / "other")
    with pytest.raises(UpdateError, match=r"'body\.4\.weight' is unexpected"):
        fedkl.load_lock(done.lock, network(), passphrase=PASSPHRASE, public=other.model)


def no_source(tmp_path, kind):
    source = tmp_path / "source"
    match kind:
        case "a folder":
            source.mkdir()
            (source / "round-000001.json").write_text("{}")
        case "a file":
            source.write_text("x")
        case "too long":
            return tmp_path / ("x" * 5000)
        case "a loop":
            source.symlink_to(source)
        case "null":
            return tmp_path / "null\0character"
    return source


@pytest.mark.parametrize("kind", ["none", "a folder", "a file", "too long", "a loop", "null"])
def test_what_is_neither_is_refused(tmp_path, kind):
    source = no_source(tmp_path, kind)
    with pytest.raises(ConfigError, match="run directory of a training, or a Flower server's folder"):
        export(source, out=tmp_path / "model")
    with pytest.raises(ConfigError):
        export(source, out=tmp_path / "model", client="client-0")
    with pytest.raises(ConfigError, match="not a run directory"):
        client_of(source, "client-0")
    assert not (tmp_path / "model").exists()


def test_an_attack_has_no_model(tmp_path):
    RunDirectory.create(tmp_path / "run", config=AttackConfig(), version="0")
    for client in (None, "client-0"):
        with pytest.raises(ConfigError, match="not a training, but 'attack'"):
            export(tmp_path / "run", out=tmp_path / "model", client=client)


@pytest.fixture
def command(capsys, monkeypatch):
    def call(*words):
        monkeypatch.setattr("sys.argv", ["fedkl", "export", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def line_of(text, word):
    """The line of Python that the command prints."""
    (line,) = [line.strip() for line in text.splitlines() if line.startswith(f"    {word}")]
    return line


def test_the_command_prints_the_line_that_gives_a_clients_model(command, runs, tmp_path):
    code, text = command(runs("keylock"), "--out", tmp_path / "model.safetensors", "--client", "client-2")
    assert code == 0, text
    assert "the public tensors after 2 rounds" in text
    model = eval(line_of(text, "fedkl.load_lock"), {"fedkl": fedkl, "Net": network})
    assert not model.training
    assert accuracy(model) == pytest.approx(recorded(runs("keylock"))["client-2"], abs=1e-9)


def test_the_command_prints_the_line_that_gives_the_servers_model(command, runs, tmp_path):
    code, text = command(runs("none"), "--out", tmp_path / "model.safetensors")
    assert code == 0, text
    model = network()
    eval(line_of(text, "model."), {"model": model, "safetensors": safetensors})
    assert accuracy(model) == pytest.approx(recorded(runs("none"))["client-0"], abs=1e-9)
    assert "no client's model" not in text


def test_the_command_names_the_network_that_a_defense_makes(command, runs, tmp_path):
    code, text = command(runs("precode"), "--out", tmp_path / "model.safetensors")
    assert code == 0, text
    assert "no client's model" not in text
    names = {"safetensors": safetensors, "Net": network}
    for start in ("from fedkl.", "model = ", "model.load"):
        exec(line_of(text, start), names)
    assert accuracy(names["model"]) == pytest.approx(recorded(runs("precode"))["client-0"], abs=0.05)


def test_the_command_says_that_the_public_model_is_no_clients(command, runs, tmp_path):
    code, text = command(runs("keylock/blind"), "--out", tmp_path / "model.safetensors")
    assert code == 0, text
    assert "This alone is no client's model: what clients keep (γ, β" in text
    assert "--client client-0" in text
    assert "The server of this training could not read them" in text
    assert line_of(text, "fedkl.load_lock").endswith(
        f"public={str(tmp_path / 'model.safetensors')!r}).model.eval()"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("{run}", "--out", "{tmp}/there"), "there: exists already"),
        (("{run}", "--out", "{tmp}/there/inside"), "cannot be written"),
        (("{run}", "--out", "{tmp}", "--replace"), "cannot be written"),
        (("{run}", "--out", "/proc/nowhere/model"), "cannot be written"),
        (("{run}", "--out", "x" * 5000), "cannot be written"),
        (("{tmp}", "--out", "{tmp}/model"), "expected the run directory of a training"),
        (("{run}", "--out", "{tmp}/model", "--client", "\x1b[2J"), "no client '\\x1b[2J'"),
    ],
)
def test_wrong_usage_is_exit_code_2_with_a_clear_line(command, runs, tmp_path, words, says):
    (tmp_path / "there").write_text("precious")
    code, text = command(*(word.format(run=runs("keylock"), tmp=tmp_path) for word in words))
    assert code == 2
    assert says in text
    assert "Traceback" not in text
    assert "\x1b[2J" not in text
    assert (tmp_path / "there").read_text() == "precious"


def test_a_run_from_elsewhere_whose_summary_is_not_one(run, tmp_path):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "rounds": "two"}))
    with pytest.warns(UserWarning, match="The checkpoint of round 2 is used instead"):
        assert export(run, out=tmp_path / "model").rounds == 2


def own_model(form, path):
    """A client's file as a function of images."""
    if form == "torch":
        return torch.export.load(path).module()
    if form == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        name = session.get_inputs()[0].name
        return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])
    model = network().eval()
    model.load_state_dict(safetensors.torch.load_file(path))
    return model


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")
@pytest.mark.parametrize(
    ("name", "form"),
    [("keylock", "state"), ("all", "torch"), ("keylock", "onnx"), ("private-layers", "torch")],
)
def test_a_clients_whole_model_predicts_what_the_run_recorded(command, runs, tmp_path, name, form):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    run, out = runs(name), tmp_path / "own"
    before = content(run)
    code, text = command(run, "--out", out, "--client", "client-1", "--for", form)
    assert code == 0, text
    assert "the whole model of client-1 after 2 rounds" in text
    assert "not encrypted. Never send it." in text
    assert [path.name for path in tmp_path.iterdir()] == ["own"], "neither lock nor public tensors beside it"
    assert content(run) == before
    model, data = own_model(form, out), images()
    logits = torch.cat([model(batch) for batch in data.test_images.split(50)])
    correct = float((logits.argmax(1) == data.test_labels).double().mean())
    assert correct == pytest.approx(recorded(run)["client-1"], abs=1e-9)
    if form == "state":
        with pytest.raises(ConfigError, match="the private model of client 'client-1'"):
            read_model(out)


@pytest.mark.parametrize("words", [(), ("--client", "client-0", "--member", "a.secret")])
def test_a_whole_model_is_one_clients(command, runs, tmp_path, words):
    code, text = command(runs("keylock"), "--out", tmp_path / "own", "--for", "torch", *words)
    assert code == 2
    assert "--for writes the model of one client" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("--client", "client-0"), ("--client", "client-0", "--for", "torch")])
def test_a_passphrase_file_is_of_a_member(command, runs, tmp_path, words):
    """A lock would be encrypted with another passphrase than the one that is in the file."""
    (tmp_path / "given").write_text("mule")
    code, text = command(
        runs("keylock"), "--out", tmp_path / "own", *words, "--passphrase-file", tmp_path / "given"
    )
    assert code == 2
    assert "--passphrase-file is of --member" in text
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_a_whole_model_replaces_no_file(command, runs, tmp_path):
    (tmp_path / "own").write_text("precious")
    words = (runs("keylock"), "--out", tmp_path / "own", "--client", "client-0", "--for", "state")
    code, text = command(*words)
    assert (code, (tmp_path / "own").read_text()) == (2, "precious")
    assert "own: exists already" in text
    assert command(*words, "--replace")[0] == 0
