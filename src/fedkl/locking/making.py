"""`fedkl.lock`: a private key-lock for any PyTorch model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fedkl.errors import LockError
from fedkl.keys import Key
from fedkl.locking import surgery, targets
from fedkl.locking.activations import Activation
from fedkl.locking.copying import copied
from fedkl.locking.elements import check_chain, per_element
from fedkl.locking.functional import functional_linear_problems
from fedkl.locking.keylock import Lock
from fedkl.locking.layers import Initialization
from fedkl.locking.options import Granularity, LockOptions
from fedkl.locking.private_layers import OwnLayers, find_layers, warn_about_frozen
from fedkl.locking.relocking import check_stays_private
from fedkl.locking.start import Start, is_kept
from fedkl.locking.targets import ExampleInputs, Layers, Target
from fedkl.locking.withholding import check_not_split


def lock(
    model: nn.Module,
    *,
    key: Key | None = None,
    layers: Layers = "first",
    granularity: Granularity = "channel",
    activation: Activation = "softplus",
    initialization: Initialization = "unit",
    start: Start = "model",
    chained: bool = True,
    share_statistics: bool = False,
    private: Sequence[str] = (),
    example_inputs: ExampleInputs | None = None,
) -> Lock:
    """Locks a copy of a model: a secret key generates the scale γ and shift β of its norm layers.

    The model's call, module names and `isinstance` relations stay. Its `parameters()` include the lock
    layers, so any optimizer trains them; its `state_dict()` does not, so uploading that gives nothing
    private away. What the lock protects against, and what breaks it, is in docs/security.md.

    **Build the optimizer after this, from the locked model's parameters.** The result is a copy: an optimizer
    of the model that was given trains that one, and the locked model not at all.

    **A trained model keeps its function**, whatever the key: γ and β of the norms that it has start at the
    values that they have, if the activation can give these (``"identity"`` gives any; β is seldom positive
    everywhere, as ``"softplus"`` and ``"relu"`` need). A model counts as trained if one of its norms has a γ
    or β other than at PyTorch's start (γ = 1 or 0, β = 0) and running statistics, if any, that have changed
    since. A server that knows this model then knows γ and β of the first round too: the lock hides what
    training makes of them. What cannot be kept: a norm that is inserted where the model has none changes what
    a trained model computes (its γ and β are drawn around 1 and 0 as far as the activation reaches them), and
    so do `private` layers, which are drawn.

    Args:
        model: Any module with norm layers, convolutions or linear layers. Not changed.
        key: The client's key; a new one if None.
        layers: ``"first"``: the first affine norm in `named_modules()` order or, without any, a norm
            inserted after the first convolution or linear layer (never the head). ``"all"``: every affine
            norm, else every convolution and linear layer but the head. ``"classifier"``: a LayerNorm put in
            front of the last linear layer, over its input features. Or module names, or a predicate over
            (name, module).
        granularity: ``"channel"``: one γ and β for each channel, as published. ``"element"``: for each
            element of a sample at the locked layer, (channels, height, width); the model then takes images
            of one size only. For batch and instance norms and convolutions; needs `example_inputs`.
        activation: act in γ = act(W k + b), β likewise. As published: ``"relu"`` or ``"sigmoid"``.
            ``"tanh"``: signed, in (−1, 1).
        initialization: Of the lock layers, ``"unit"`` or ``"published"``; see `LockLayer`.
        start: ``"model"``: a trained model's γ and β start at the values that they have, an untrained
            one's are drawn, as published. ``"drawn"``: drawn in any case. That hides them from a server that
            knows the model, and destroys what a trained model has learned.
        chained: γ and β of one lock are the k of the next, as published; False: every lock from the key, as
            several locks per element must be.
        share_statistics: Send the norms' running statistics too. They give away mean and variance of the
            batch; by default they are private.
        private: Names of further modules whose parameters and buffers stay with the client, which draws its
            own start for what is trained of them. ``"head"`` also means the last linear layer, ``"stem"`` the
            first layer: a convolution, linear layer, embedding, attention or recurrent layer.
        example_inputs: A tensor, tuple or dict of arguments. If given, the model is run once (a copy, in
            eval mode) and execution order replaces `named_modules()` order.

    Returns:
        The `Lock`; call its ``model`` as before.

    Raises:
        LockError: With every problem found; the activation cannot give the γ and β of a trained model.
        SecretError: The model was made by `bake()`, and something would be sent that was private there.

    Source:
        arXiv 2305.04095, section 3.2; the published setting is `Key.generate(distribution="uniform")`,
        ``activation="relu"``, ``initialization="published"``.

    >>> import torch
    >>> body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> net = nn.Sequential(body, nn.Flatten(), nn.Linear(288, 10))
    >>> locked = lock(net, key=Key.generate())
    >>> locked.model(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    >>> sorted(locked.public_state())
    ['0.0.bias', '0.0.weight', '2.bias', '2.weight']
    """
    key = Key.generate() if key is None else key
    options, keep = _planned(
        model,
        key,
        layers=layers,
        granularity=granularity,
        activation=activation,
        initialization=initialization,
        start=start,
        chained=chained,
        share_statistics=share_statistics,
        private=private,
        example_inputs=example_inputs,
    )
    return _new(copied(model, subject="lock"), key=key, options=options, keep=keep)


def lock_(
    model: nn.Module,
    *,
    key: Key | None = None,
    layers: Layers = "first",
    granularity: Granularity = "channel",
    activation: Activation = "softplus",
    initialization: Initialization = "unit",
    start: Start = "model",
    chained: bool = True,
    share_statistics: bool = False,
    private: Sequence[str] = (),
    example_inputs: ExampleInputs | None = None,
) -> Lock:
    """Locks a model in place; see `lock`. Build optimizers afterwards: some parameters are replaced.

    An optimizer of before goes on training the rest of the model, but neither γ and β nor the lock layers; a
    warning says so.

    Raises:
        LockError: The model cannot be locked as asked; it is unchanged then.
    """
    key = Key.generate() if key is None else key
    options, keep = _planned(
        model,
        key,
        layers=layers,
        granularity=granularity,
        activation=activation,
        initialization=initialization,
        start=start,
        chained=chained,
        share_statistics=share_statistics,
        private=private,
        example_inputs=example_inputs,
    )
    surgery.warn_about_optimizers(model)
    return _new(model, key=key, options=options, keep=keep)


def _planned(
    model: nn.Module,
    key: Key,
    *,
    layers: Layers,
    granularity: Granularity,
    activation: Activation,
    start: Start,
    chained: bool,
    private: Sequence[str],
    example_inputs: ExampleInputs | None,
    **others: Any,
) -> tuple[LockOptions, bool]:
    """What to lock and how, and whether γ and β are kept; checks everything and changes nothing."""
    _check_types(model, key, layers, private)
    own, problems = find_layers(model, private)
    problems = [f"private: {problem}" for problem in problems]
    if layers == "classifier" and example_inputs is None:
        problems += functional_linear_problems(model)
    order = targets.modules_in_order(model, example_inputs=example_inputs)
    chosen = targets.plan(model, layers=layers, order=order, problems=problems)
    if granularity == "element":
        chosen = per_element(model, chosen, example_inputs=example_inputs)
    if chained:
        check_chain(chosen)
    _check_something_is_sent(model, chosen, own)
    options = LockOptions(
        layers=tuple(target.name for target in chosen),
        activation=activation,
        chained=chained,
        key_length=key.length,
        granularity=granularity,
        classifier=chosen[0].before,
        shapes=tuple(target.shape or () for target in chosen) if any(t.shape for t in chosen) else (),
        private=own,
        **others,
    )
    keep = is_kept(model, chosen, start=start, activation=activation)
    warn_about_frozen(model, own)
    targets.warn_about_open_layers(order, chosen, private=map(model.get_submodule, own))
    return options, keep


def _check_something_is_sent(model: nn.Module, chosen: Sequence[Target], own: Sequence[str]) -> None:
    """Raises LockError where γ, β and the private layers are all that the model has."""
    kept = {id(parameter) for name in own for parameter in model.get_submodule(name).parameters()}
    kept |= {
        id(p) for target in chosen if not target.inserts for p in target.module.parameters(recurse=False)
    }
    if own and all(id(parameter) in kept for parameter in model.parameters()):
        what = ", ".join((*own, *(target.name for target in chosen)))
        raise LockError(
            f"lock: with {what} private, no parameter is left to send. Keep fewer layers private."
        )


def _check_types(model: Any, key: Any, layers: Any, private: Any) -> None:
    check_model(model)
    if not isinstance(key, Key):
        expected = "a fedkl.Key, e.g. Key.generate(), or None"
        raise LockError(f"lock: key= must be {expected}, got {type(key).__name__}.")
    if not isinstance(layers, Sequence) and not callable(layers):
        expected = "'first', 'all', 'classifier', a list of names or a predicate"
        raise LockError(f"lock: layers= must be {expected}, got {type(layers).__name__}.")
    if isinstance(private, str) or not isinstance(private, Sequence):
        raise LockError(
            f"lock: private= must be a list of names, e.g. ['head'], got {type(private).__name__}."
        )


def check_model(model: Any) -> None:
    """Raises LockError for what is no module, or has private tensors already."""
    if not isinstance(model, nn.Module):
        raise LockError(f"lock: model= must be a torch.nn.Module, got {type(model).__name__}.")
    check_not_split(model)


def _new(model: nn.Module, *, key: Key, options: LockOptions, keep: bool) -> Lock:
    """A new client's lock: its private layers are drawn."""
    result = install(model, key=key, options=options, chosen=options.targets(model), keep=keep)
    result.private_layers.redraw(model)
    return result


def install(
    model: nn.Module, *, key: Key, options: LockOptions, chosen: Sequence[Target], keep: bool = False
) -> Lock:
    """Locks a model in place as the options say; what its private tensors hold is set afterwards."""
    check_stays_private(model, chosen, options=options)
    norm_names = tuple(target.norm_name for target in chosen)
    surgery.install(
        model,
        chosen,
        key=key,
        activation=options.activation,
        initialization=options.initialization,
        chained=options.chained,
        share_statistics=options.share_statistics,
        keep=keep,
    )
    own = OwnLayers(model, options.private)
    return Lock(model, key=key, options=options, norms=norm_names, own=own)
