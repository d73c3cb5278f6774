"""Every wrong use gets a clear error that names the module and the remedy, before anything has changed."""

from __future__ import annotations

import copy
import io
import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import group_norm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, prune

import fedkl
from fedkl.defenses import NoDefense, PrivateLayers
from fedkl.defenses.precode import PRECODE
from fedkl.errors import ConfigError, LockError, SecretError, UpdateError
from fedkl.locking import Split, withhold_statistics


class SubNorm(nn.LayerNorm):
    pass


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.plain_norm, self.sub_norm = nn.BatchNorm2d(4, affine=False), SubNorm(4)
        self.drop, self.fc = nn.Dropout(0.0), nn.Linear(4, 2)

    def forward(self, x):
        x = self.plain_norm(torch.relu(self.bn1(self.c1(x)))).mean((2, 3))
        return self.fc(self.drop(self.sub_norm(x)))


class TiedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.other = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.gain = self.norm.weight


class LocalFunctional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(group_norm(torch.nn.functional.layer_norm(self.a(x), (4,)), 2))


class LooksFunctional(nn.Module):
    """Modules called like functional norms are none."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"layer_norm": nn.LayerNorm(4)})
        self.layer_norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.layer_norm(self.inner.layer_norm(x)))


def snapshot(model):
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {name: t.clone() for name, t in named if not is_lazy(t) and not t.is_meta}
    structure = [
        (name, type(m), list(m._forward_hooks), list(m._state_dict_hooks))
        for name, m in model.named_modules()
    ]
    return structure, [*model.state_dict()], tensors


def assert_refused(model, *messages, **options):
    """Both entry points refuse, every message is there, and the model is what it was."""
    before = snapshot(model)
    for entry in (fedkl.lock_, fedkl.lock):
        with pytest.raises(LockError) as caught:
            entry(model, **options)
        for message in messages:
            assert message in str(caught.value)
    after = snapshot(model)
    assert before[:2] == after[:2]
    assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])


def test_nothing_lockable():
    assert_refused(nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), "no affine norm", "but the head", "layers=")
    assert_refused(nn.Embedding(3, 2), "no affine norm", "register_norm")


def test_all_problems_of_a_list_of_names_come_together():
    assert_refused(
        Net(),
        "'bn_1' is not a module of this model, did you mean 'bn1'?",
        "'zzz' is not a module of this model\n",
        "'plain_norm' (BatchNorm2d) has no scale; build it with affine=True",
        "'sub_norm' (SubNorm) is a subclass of a norm that is not registered",
        "'drop' (Dropout) is neither a norm, a convolution nor a linear layer",
        "fedkl.register_norm",
        layers=["bn_1", "zzz", "plain_norm", "sub_norm", "drop", "bn1"],
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "layers= is an empty list"),
        (lambda name, module: False, "the predicate matched none of c1, bn1, fc"),
        ("bn1", "layers='bn1' is neither 'first', 'all' nor 'classifier' (a single name goes in a list)"),
    ],
)
def test_unusable_choices(unchecked, layers, message):
    assert_refused(Net(), message, layers=layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "activation='gelu' is unknown. Choose one of softplus, relu"),
        ({"initialization": "zeros"}, "initialization='zeros' is unknown. Choose one of unit, published"),
        ({"key": torch.rand(4)}, "key= must be a fedkl.Key, e.g. Key.generate(), or None, got Tensor"),
        ({"layers": 3}, "layers= must be 'first', 'all', 'classifier', a list of names or a predicate, got"),
    ],
)
def test_unknown_options(unchecked, options, message):
    assert_refused(Net(), message, **options)


def test_no_module_at_all(unchecked):
    with pytest.raises(LockError, match=r"model= must be a torch.nn.Module, got dict"):
        fedkl.lock({})


def activated():
    model = nn.Sequential(Net())
    model[0].last = model(torch.rand(2, 3, 8, 8))
    return model, "0.last"


def activated_twice():
    model, _ = activated()
    model.seen = [model[0].last]
    del model[0].last
    return model, "seen"


def pruned():
    model = Net()
    prune.l1_unstructured(model.fc, "weight", 0.5)
    return model, "fc.weight"


def normed():
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(model.fc)
    return model, "fc.weight"


@pytest.mark.parametrize("build", [activated, activated_twice, pruned, normed], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "use",
    [
        lambda model: fedkl.lock(model, layers=[next(n for n, _ in model.named_modules() if "bn1" in n)]),
        lambda model: fedkl.lock(model, example_inputs=torch.rand(2, 3, 8, 8)),
        NoDefense().prepare,
        PrivateLayers().prepare,
        PRECODE().prepare,
        lambda model: Split(model).bake(),
    ],
    ids=["lock", "example", "none", "private-layers", "precode", "bake"],
)
def test_a_model_that_cannot_be_copied_is_explained(build, use):
    model, name = build()
    with pytest.raises((LockError, ConfigError), match=rf"(?s)cannot be copied.*'{name}'.*parametrizations"):
        use(model)


def test_what_fails_in_a_copy_for_another_reason_is_not_hidden():
    class Stubborn(nn.ReLU):
        def __deepcopy__(self, memo):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        NoDefense().prepare(nn.Sequential(Stubborn()))


def test_locking_twice():
    lock = fedkl.lock(Net(), layers=["bn1"])
    assert_refused(lock.model, "locked already", "lock.bake()", layers="all")
    assert_refused(nn.Sequential(lock.model), "locked already")
    fedkl.lock(lock.bake(), layers=["bn1"])


def test_loading_a_lock_into_a_locked_model(tmp_path, unchecked):
    lock = fedkl.lock(Net(), layers=["bn1"])
    lock.save(tmp_path / "lock", passphrase=None)
    with pytest.raises(LockError, match=r"locked already .* lock.bake\(\)"):
        fedkl.load_lock(tmp_path / "lock", lock.model, passphrase=None)
    with pytest.raises(LockError, match=r"model= must be a torch.nn.Module, got dict"):
        fedkl.load_lock(tmp_path / "lock", {}, passphrase=None)
    assert fedkl.load_lock(tmp_path / "lock", lock.bake(), passphrase=None).layers == ("bn1",)


def narrow(*widths):
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(part for pair in pairs for part in (nn.Linear(*pair), nn.Tanh())))


def test_a_linear_layer_of_one_output_gets_no_norm():
    message = "'2' (Linear) has one output, which a norm inserted after it would make constant"
    assert_refused(narrow(4, 4, 1, 4, 2), message, layers=["0", "2"])
    assert_refused(narrow(4, 1, 2), "nor a linear layer of more than one output")
    assert_refused(narrow(4, 1, 1), "the predicate matched none", layers=lambda name, module: True)
    assert fedkl.lock(narrow(1, 1, 4, 3), layers="first").layers == ("2.norm",)
    assert fedkl.lock(narrow(4, 4, 1, 4, 2), layers="all").layers == ("0.norm", "4.norm")
    assert fedkl.lock(narrow(4, 4, 1), layers="all").layers == ("0.norm",)  # the head stays the head
    conv = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten(), nn.Linear(9, 2))
    assert fedkl.lock(conv).layers == ("0.norm",)


def test_a_tied_scale_is_refused():
    assert_refused(TiedNorm(), "'norm.weight' is tied to a parameter of the model itself")
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4))
    model[2].bias = model[1].bias
    assert_refused(
        model,
        "'1.bias' is tied to a parameter of '2'",
        "'2.bias' is tied to a parameter of '1'",
        layers="all",
    )


def test_lazy_and_meta_modules():
    lazy = nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2)
    )
    assert_refused(lazy, "'0.weight' has no values yet", "'1.weight' has no values yet", "one forward pass")
    assert_refused(Net().to("meta"), "'bn1.weight' has no values yet", layers=["bn1"])
    lazy(torch.rand(2, 3, 3, 3))
    assert fedkl.lock(lazy).layers == ("1",)


def test_integer_modules():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    assert_refused(model, "'0.weight' has dtype torch.int8, expected a floating-point one")


def test_parametrized_norms_are_refused_and_parametrized_layers_are_not():
    model = Net()
    nn.utils.parametrize.register_parametrization(model.bn1, "weight", nn.Softplus(), unsafe=True)
    assert_refused(model, "'bn1' is parametrized already; remove its parametrizations first", layers=["bn1"])
    weighted = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2))
    assert fedkl.lock(weighted).layers == ("0.norm",)


def test_a_scale_that_is_not_a_parameter():
    class Shifted(nn.LayerNorm):
        gain = property(lambda self: 1 + self.weight)

    fedkl.register_norm(Shifted, scale="gain")
    assert_refused(nn.Sequential(nn.Linear(4, 4), Shifted(4)), "'1.gain' is not a parameter of the module")


def test_a_layer_that_has_a_norm_attribute():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].norm = 1.0
    assert_refused(model, "'0' already has an attribute 'norm'; rename it")


def test_layers_that_the_example_does_not_reach():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.early, self.never = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4)
            self.fc = nn.Linear(4, 4)

        def forward(self, x, *, scale):
            return scale * self.late(self.fc(self.early(x)))

    example = {"x": torch.rand(2, 4), "scale": 2}
    message = "'never' (LayerNorm) is not called by the model on the example inputs"
    assert_refused(Unused(), message, layers=["never"], example_inputs=example)
    assert fedkl.lock(Unused(), layers="all", example_inputs=example).layers == ("early", "late")
    assert fedkl.lock(Unused(), layers="all").layers == ("late", "early", "never")


def test_functional_norms_are_refused_unless_the_layers_are_named():
    message = "the model itself (LocalFunctional) calls group_norm, layer_norm as a function"
    assert_refused(LocalFunctional(), message, "name the layers to lock")
    assert fedkl.lock(LocalFunctional(), layers=["a"]).layers == ("a.norm",)
    assert fedkl.lock(LooksFunctional(), layers="all").layers == ("inner.layer_norm", "layer_norm")


def test_functional_norms_in_helpers_and_closures():
    norm = F.rms_norm

    class Helped(nn.Sequential):
        def forward(self, x):
            return super().forward(self._helper(x))

        def _helper(self, x):
            return torch.layer_norm(x, (4,))

    class Closed(nn.Sequential):
        def forward(self, x):
            return norm(super().forward(x), (2,))

    parts = (nn.Linear(4, 4), nn.Linear(4, 2))
    assert_refused(Helped(*parts), "(Helped) calls layer_norm as a function")
    assert_refused(Closed(*parts), "(Closed) calls rms_norm as a function")
    assert fedkl.lock(nn.Sequential(*parts)).layers == ("0.norm",)


def test_a_key_of_another_length():
    lock = fedkl.lock(Net(), layers=["bn1"], key=fedkl.Key.generate(length=8))
    with pytest.raises(LockError, match=r"keys of length 8, got one of 9. Use Key.generate\(length=8\)"):
        lock.use_key(fedkl.Key.generate(length=9))


def test_a_generated_tensor_cannot_be_assigned():
    lock = fedkl.lock(Net(), layers=["bn1"])
    with pytest.raises(SecretError, match="scale of a locked norm is generated"):
        lock.model.bn1.weight = torch.ones(4)


def damaged(state):
    """(state, message) for every way a state can be wrong."""
    name = next(n for n, t in state.items() if t.is_floating_point() and t.numel() > 2)
    good = state[name]
    yield {n: t for n, t in state.items() if n != name}, f"'{name}' is missing"
    yield {**state, "extra": good}, "'extra' is unexpected"
    yield (
        {**state, name: good[:-1]},
        f"'{name}' has shape {tuple(good[:-1].shape)}, expected {tuple(good.shape)}",
    )
    yield {**state, name: good.double()}, f"'{name}' has dtype torch.float64, expected torch.float32"
    for value in (float("nan"), float("inf")):
        yield {**state, name: torch.full_like(good, value)}, f"'{name}' has non-finite values"


@pytest.mark.parametrize("side", ["public", "private", "full"])
def test_unusable_states(side):
    lock = fedkl.lock(Net(), layers=["bn1"])
    state, load = getattr(lock, f"{side}_state")(), getattr(lock, f"load_{side}_state")
    before = snapshot(lock.model)
    cases = list(damaged({name: tensor + 1 for name, tensor in state.items()}))
    assert len(cases) == 6
    for wrong, message in cases:
        with pytest.raises(UpdateError) as caught:
            load(wrong)
        assert message in str(caught.value)
        assert "lock." in str(caught.value)
        after = snapshot(lock.model)
        assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])


def test_a_full_state_is_a_clients_whole_model_without_the_key():
    lock = fedkl.lock(Net(), layers=["bn1"], key=fedkl.Key.generate(length=36))
    x = torch.rand(2, 3, 5, 5)
    lock.model(x).sum()
    state = lock.full_state()
    assert state.keys() == lock.public_state().keys() | lock.private_state().keys()
    assert not any(torch.equal(t.flatten(), lock.key.reveal().to(t.dtype)) for t in state.values())
    other = fedkl.lock(Net(), layers=["bn1"], key=lock.key)
    other.load_full_state(state)
    assert all(torch.equal(other.full_state()[name], tensor) for name, tensor in state.items())
    torch.testing.assert_close(other.model.eval()(x), lock.model.eval()(x))
    state["fc.weight"].zero_()
    assert lock.model.fc.weight.abs().sum() > 0
    for side in (lock.public_state(), lock.private_state()):
        with pytest.raises(UpdateError, match="is missing"):
            lock.load_full_state(side)


def test_all_problems_of_a_state_come_together():
    lock = fedkl.lock(Net(), layers=["bn1"])
    state = lock.public_state()
    state["c1.weight"] = torch.full_like(state["c1.weight"], float("nan"))
    state["fc.weight"] = state["fc.weight"][:, :1]
    state["more"] = state.pop("fc.bias")
    with pytest.raises(UpdateError) as caught:
        lock.load_public_state(state)
    for part in (
        "'c1.weight' has non-finite",
        "'fc.weight' has shape",
        "'more' is unexp",
        "'fc.bias' is missing",
    ):
        assert part in str(caught.value)
    assert str(state["fc.weight"][0, 0].item())[:6] not in str(caught.value)


def test_a_tensor_that_is_none(unchecked):
    lock = fedkl.lock(Net(), layers=["bn1"])
    with pytest.raises(UpdateError, match=r"'fc.bias' is a list, expected a Tensor"):
        lock.load_public_state({**lock.public_state(), "fc.bias": [1.0, 2.0]})


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "name", ["bn1.parametrizations.weight.original0", "bn1.running_mean", "plain_norm.running_var"]
)
def test_private_names_in_a_public_state(name, strict):
    lock = fedkl.lock(Net(), layers=["bn1"])
    private = lock.private_state()
    state = {**lock.public_state(), name: private[name] + 1}
    with pytest.raises(SecretError, match=rf"'{name}' is private"):
        lock.load_public_state(state)
    with pytest.raises(RuntimeError, match=rf"'{name}' is private and must not come with a public state"):
        lock.model.load_state_dict(state, strict=strict)
    assert all(torch.equal(private[n], t) for n, t in lock.private_state().items())


@pytest.mark.parametrize("assign", [True, False])
def test_torchs_own_loading_of_a_public_state(assign):
    lock = fedkl.lock(Net(), layers=["bn1"])
    private = lock.private_state()
    buffer = io.BytesIO()
    torch.save({name: tensor + 1 for name, tensor in lock.model.state_dict().items()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    lock.model.load_state_dict(state, assign=assign)
    assert all(torch.equal(state[n], t) for n, t in lock.public_state().items())
    assert all(torch.equal(private[n], t) for n, t in lock.private_state().items())
    lock.model(torch.rand(2, 3, 5, 5)).sum().backward()


def test_public_gradient_refuses_unusable_losses():
    lock = fedkl.lock(Net(), layers=["bn1"])
    x = torch.rand(2, 3, 5, 5)
    with pytest.raises(UpdateError, match=r"expected a scalar loss, got shape \(2, 2\)"):
        lock.public_gradient(lock.model(x))
    with pytest.raises(UpdateError, match="does not depend on a trainable public parameter"):
        lock.public_gradient(lock.model(x).detach().sum())
    with pytest.raises(UpdateError, match="was not computed by this model"):
        lock.public_gradient(Net()(x).sum())


def test_sparse_gradients_are_sent_dense():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.LayerNorm(4), nn.Linear(4, 2))
    lock = fedkl.lock(model)
    gradient = lock.public_gradient(lock.model(torch.tensor([1, 3])).square().sum())
    lock.public_update(gradient, kind="gradient", num_samples=2, round=0)
    assert gradient["0.weight"].layout == torch.strided


def test_an_optimizer_from_before_lock_is_warned_about():
    for model in (Net(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.warns(UserWarning, match=r"An optimizer was built before lock_\(\).*Build it again"):
            fedkl.lock_(model)
        del optimizer
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fedkl.lock(model)
    assert optimizer.param_groups


def test_open_layers_are_warned_about():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"2 parametric layers run before the first lock \('3'\).*: 0, 2\."):
        fedkl.lock(model)
    model.insert(1, SubNorm(4))
    with pytest.warns(UserWarning, match=r"not registered: 1\. .* SubNorm, make it lockable"):
        fedkl.lock(model)


def test_frozen_norms_are_passed_over_or_warned_of():
    """A lock of one never changes; and no gradient is open before the lock, as there is none."""

    def make():
        model = nn.Sequential(
            nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        )
        model[:2].requires_grad_(False)
        return model

    assert fedkl.lock(make()).layers == ("3",)
    assert fedkl.lock(make(), layers="all").layers == ("3",)
    with pytest.warns(UserWarning, match=r"1: γ and β are frozen .* hides nothing"):
        fedkl.lock(make(), layers=["1"])
    whole = make().requires_grad_(False)  # nobody trains it, so nothing is lost
    assert fedkl.lock(whole).layers == ("1",)


def test_warnings_point_at_the_users_line(tmp_path):
    script = tmp_path / "users.py"
    script.write_text(
        "import fedkl, torch\nfrom torch import nn\n"
        "make = lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))\n"
        "fedkl.lock(make())\nfedkl.lock_(make())\n"
        "model = make(); optimizer = torch.optim.SGD(model.parameters())\nfedkl.lock_(model, layers=['0'])\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    lines = [line.split(":")[1] for line in result.stderr.splitlines() if "UserWarning" in line]
    assert lines == ["4", "5", "7"]


def test_the_statistics_of_a_registered_subclass_stay_private():
    class SubBatchNorm(nn.BatchNorm1d):
        pass

    fedkl.register_norm(SubBatchNorm)
    lock = fedkl.lock(nn.Sequential(nn.Linear(4, 4), SubBatchNorm(4)))
    assert {"1.running_mean", "1.running_var"} <= lock.private_names
    shared = fedkl.lock(nn.Sequential(nn.Linear(4, 4), SubBatchNorm(4)), share_statistics=True)
    assert {"1.running_mean", "1.running_var"} <= set(shared.public_state())


# What is done to a model locked at a LayerNorm, and the norm whose statistics would be public then.
LATE_NORMS = [
    (nn.SyncBatchNorm.convert_sync_batchnorm, "3", "SyncBatchNorm"),
    (lambda model: model.append(nn.BatchNorm1d(4)), "4", "BatchNorm1d"),
    (lambda model: model.__setitem__(3, nn.Sequential(nn.BatchNorm1d(4))), "3.0", "BatchNorm1d"),
]


@pytest.mark.parametrize(("change", "name", "kind"), LATE_NORMS)
def test_statistics_of_norms_that_came_after_the_lock_are_refused(change, name, kind):
    plain = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    shared, lock = fedkl.lock(plain, share_statistics=True), fedkl.lock(plain)
    for either in (shared, lock):
        change(either.model)
    assert f"{name}.running_mean" in shared.public_state()
    model = lock.model
    uses = (lock.public_state, lock.full_state, lambda: lock.load_public_state({}), model.state_dict)
    kinds = (lambda: lock.schema("weights"), lambda: lock.schema("gradient"))
    for use in (*uses, *kinds, copy.deepcopy(model).state_dict, nn.Sequential(model).state_dict):
        with pytest.raises(SecretError, match=rf"'(0\.)?{name}' \({kind}\): .*running_mean") as caught:
            use()
        assert "before locking, or call fedkl.locking.withhold_statistics(model)" in str(caught.value)
    assert f"{name}.running_mean" in lock.bake().state_dict()
    withhold_statistics(model)
    assert f"{name}.running_mean" in lock.private_state()
    assert lock.public_state().keys() == model.state_dict().keys()
    assert lock.private_names.isdisjoint(lock.public_state())


def test_a_split_that_withholds_nothing_shares_statistics():
    split = Split(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    split.model.append(nn.BatchNorm1d(4))
    assert {"1.running_mean", "2.running_mean"} <= set(split.public_state())
    assert split.schema("weights").specs.keys() == split.public_state().keys()


def test_register_norm_takes_module_types_only(unchecked):
    with pytest.raises(LockError, match=r"expected a subclass of nn.Module"):
        fedkl.register_norm(dict)


class Scaled(nn.Module):
    """What its `state_dict` holds of `scale`, and what else, is up to a test."""

    def __init__(self, how):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)
        self.scale, self.how = nn.Parameter(torch.ones(6)), how
        if how == "clone":
            self.register_state_dict_post_hook(
                lambda module, state, prefix, _: state.update(scale=state["scale"].clone())
            )
        elif how == "lock layer":
            self.register_state_dict_post_hook(
                lambda module, state, prefix, _: state.update({"norm.weight": module.norm.weight})
            )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.how == "cast":
            destination[prefix + "scale"] = self.scale.half()

    def forward(self, x):
        return self.head(self.norm(self.body(x)) * self.scale)


class Remembering(Scaled):
    def get_extra_state(self):
        return {"version": 1}


@pytest.mark.parametrize("prepare", [Split, fedkl.lock], ids=["no defense", "lock"])
@pytest.mark.parametrize(
    ("build", "how", "problem"),
    [
        (Scaled, "clone", "'scale' is a copy or a result"),
        (Scaled, "cast", "'scale' is a copy or a result"),
        (Scaled, "lock layer", "'norm.weight' is a copy or a result"),
        (Remembering, "", "'_extra_state' is a dict"),
    ],
    ids=["clone", "cast", "lock layer", "extra state"],
)
@pytest.mark.filterwarnings("ignore:2 parametric layers run before:UserWarning")
def test_a_state_that_is_not_the_models_own_tensors_is_refused(prepare, build, how, problem):
    """Nothing could be loaded into a copy, without a word; and a copy of γ is no private name."""
    if how == "lock layer" and prepare != fedkl.lock:
        pytest.skip("without a lock it is an ordinary parameter")
    split = prepare(build(how))
    for use in (split.public_state, split.full_state, lambda: split.load_public_state({})):
        with pytest.raises(LockError, match=rf"state_dict\(\) of this {build.__name__} makes") as caught:
            use()
        assert problem in str(caught.value)
        assert "Register the tensors" in str(caught.value)


def test_tied_tensors_and_parametrizations_are_the_models_own():
    model = Scaled("")
    model.other = model.head
    parametrizations.weight_norm(model.body)
    split = Split(model)
    state = {name: torch.full_like(tensor, 0.25) for name, tensor in split.public_state().items()}
    assert {"other.weight", "head.weight", "body.parametrizations.weight.original0"} <= state.keys()
    split.load_public_state(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in split.public_state().items())
