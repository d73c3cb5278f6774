"""Members of a cohort, a folder of secret files, and Flower apps that are masked."""

from __future__ import annotations

from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedkl.dates import today
from fedkl.flower import Guard, Masked, MaskMod, run_in_process
from fedkl.masking import MemberFile, MemberKeys, Rules, new_roster
from tests.flower.setting import net, server_of, step

PASSPHRASE = "correct horse"


def cohort(folder, *, name="study", members=3, **rules):
    """Secret files ``client-0.secret`` … of members who have joined a new cohort."""
    folder.mkdir(exist_ok=True)
    files = {}
    for number in range(members):
        keys = MemberKeys.new(f"client-{number}", today=today())
        path = folder / f"{keys.name}.secret"
        files[keys.name] = MemberFile.create(path, keys, passphrase=PASSPHRASE)
    found(files, name=name, **rules)
    return folder


def found(files, *, name="study", previous=None, **rules):
    """Founds a cohort, which all files join, and closes them."""
    keys = [file.keys for file in files.values()]
    sealed = new_roster(
        name=name,
        cards=[each.card() for each in keys],
        rules=Rules(**rules),
        signer=keys[0],
        today=today(),
        previous=previous,
    )
    for file in files.values():
        file.join(sealed, today=today(), fingerprint=sealed.roster.fingerprint)
        file.close()
    return sealed


def trained(message, context):
    """What a client's function is without fedkl: a new model, the state that came, some steps."""
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    number = int(context.node_config["partition-id"])
    loss = step(model, seed=number)
    metrics = MetricRecord({"num-examples": 8 + number, "loss": loss, "secret": 3.0})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return FlowerMessage(content, reply_to=message)


def evaluated(message, context):
    """A sum over the model that came, which shows whether it is the one that it should be."""
    state = message.content["arrays"].to_torch_state_dict()
    total = float(sum(tensor.double().sum() for tensor in state.values()))
    metrics = MetricRecord({"num-examples": 8, "total": total})
    return FlowerMessage(RecordDict({"metrics": metrics}), reply_to=message)


def app_of(*mods, train=trained, evaluate=evaluated):
    app = ClientApp(mods=list(mods))
    app.train()(train)
    app.evaluate()(evaluate)
    return app


def run(
    folder,
    *,
    rounds=2,
    nodes=3,
    strategy=None,
    checkpoints=None,
    app=None,
    aggregation=None,
    initial=None,
    evaluate_fn=None,
    **more,
):
    """A run in one process; returns Flower's result."""
    results = []
    guard = Guard(
        strategy or FedAvg(),
        checkpoints=checkpoints,
        aggregation=Masked(metrics=("loss",)) if aggregation is None else aggregation,
    )

    def main(grid):
        arrays = ArrayRecord(net().state_dict()) if initial is None else initial
        results.append(guard.start(grid, arrays, num_rounds=rounds, evaluate_fn=evaluate_fn))

    run_in_process(
        server_of(main),
        app or app_of(MaskMod()),
        clients=nodes,
        node_config={"fedkl-member": str(folder), "fedkl-passphrase-file": ""},
        **more,
    )
    return results[0]
