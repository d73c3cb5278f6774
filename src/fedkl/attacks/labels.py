"""Labels from gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedkl.attacks.probing import as_taken, probe_of
from fedkl.errors import AttackError
from fedkl.protocol import Auxiliary, Observation, Rescaling
from fedkl.types import ImageBatch, Labels

_PROBES = 64
_OWN = 512  # images of the server's own, at most
_SURE, _FAINT = 10.0, 1e-3  # weights of the shares' sum, beside equations with entries of at most 1


def infer_label(observation: Observation) -> Labels:
    """The label of a single image, from the classifier's gradient.

    With cross-entropy the gradient of the last bias is p − y: negative for the true class only. Without a
    bias, the last weight's gradient has the largest row for it, whatever the classifier's inputs: rows are
    these times p − y, and 1 − p of the true class is the sum of all other p. Weight decay is taken out.

    Returns:
        Shape ``(1,)``.

    Raises:
        AttackError: More than one image stands behind the gradient, or the classifier's gradient was not
            observed.

    Source:
        Zhao et al. 2020 (iDLG), section 3.1.
    """
    if observation.batch_size != 1:
        raise AttackError(f"Label inference works for one image, got a batch of {observation.batch_size}.")
    weight, bias = head_names(observation)
    if bias in observation.gradient:
        evidence = _undecayed(observation, bias)
    elif weight in observation.gradient:
        evidence = -_undecayed(observation, weight).flatten(1).norm(dim=1)
    else:
        raise AttackError("Label inference needs the gradient of the last linear layer; it was not observed.")
    return torch.argmin(evidence, dim=0, keepdim=True)


def infer_labels(observation: Observation) -> Labels:
    """The labels of a batch, from how far the classifier's bias gradient is from the mean prediction.

    With cross-entropy that gradient g is p̄ − n/B, for the mean prediction p̄ and n images of each class. With
    images of its own the server knows how predictions depend on the class: p̄ = Āᵀ n/B, with a row of Ā for
    each class, and n follows by least squares without negative counts. Else it estimates p̄ from random
    images: exact as long as predictions hardly depend on the image, as in an untrained network. Counts are
    rounded so that they sum up to B. Of a trained CIFAR-10 network (batches of 4 to 64) own images named
    73 to 81 % of the labels, random ones 51 to 53 %. One image: `infer_label`.

    Weight decay of the bias is taken out. Where a defense clips, g is up to a factor: that of the classes
    that are not there, whose g is p̄ before it; none has a larger one. Where all are, counts are too even.

    Returns:
        Shape ``(batch,)``, in ascending order: which image has which label is not known. It does not matter
        for a gradient of all images, but for steps of some: `order_matters`.

    Raises:
        AttackError: The classifier's bias gradient was not observed.

    Source:
        The count estimate of Wainakh et al. 2022 (LLG) and Geng et al. 2021, with mean predictions of own
        or of random images in place of their empirical correction.
    """
    if observation.batch_size == 1:
        return infer_label(observation)
    _, bias = head_names(observation)
    if bias not in observation.gradient:
        raise AttackError(
            "Label inference for a batch needs the gradient of the last linear layer's bias; it was not "
            "observed. Grant the labels, or attack one image."
        )
    if observation.local.algorithm == "fedavg" and observation.local.optimizer != "sgd":
        raise AttackError(
            "Label inference for a batch needs updates of SGD, got those of "
            f"{observation.local.optimizer}. Grant the labels, or attack one image."
        )
    whole = isinstance(observation.transform, Rescaling)
    clipped = whole or observation.local.per_example is not None
    gradient = _undecayed(observation, bias).double().cpu()
    pull = _decay(observation, bias).double().cpu() if whole else torch.zeros_like(gradient)
    own = observation.auxiliary
    if own is not None and len(own.images) >= observation.classes:  # fewer say little of most classes
        predictions = _mean_predictions(observation, own)
        shares = _shares(predictions, gradient, pull=pull, clipped=clipped)
    else:
        predicted = _mean_prediction(observation) + pull
        factor = (gradient / predicted).max() if clipped and bool((gradient > 0).any()) else 1.0
        shares = (predicted - gradient / factor).clamp_min(0)
    return torch.repeat_interleave(_rounded(shares, observation.batch_size))


def known_labels(observations: Sequence[Observation]) -> list[Labels]:
    """The labels that were granted, else those that can be inferred."""
    return [infer_labels(o) if o.labels is None else o.labels for o in observations]


def order_matters(observation: Observation) -> bool:
    """Whether the server lacks which image has which label, and what it sees depends on that.

    Local steps of some of the images only are other steps where the same labels come in another order. Then
    true images with inferred labels do not explain an update.
    """
    batches = observation.local.batches(observation.batch_size)
    return observation.labels is None and any(len(batch) < observation.batch_size for batch in batches)


def head_names(observation: Observation) -> tuple[str, str]:
    """Names of the classifier's weight and bias: the last linear layer with an output for every class."""
    layers = [(name, m) for name, m in observation.model.named_modules() if isinstance(m, nn.Linear)]
    heads = [name for name, m in layers if m.out_features == observation.classes]
    weight, bias = (f"{heads[-1]}.{part}" if heads else "" for part in ("weight", "bias"))
    return weight, bias


def _undecayed(observation: Observation, name: str) -> Tensor:
    """A parameter's gradient, averaged over local steps of SGD, without weight decay; of Adam what was sent.

    Where updates are clipped, decay is clipped along: it stays in, as the factor is not known.
    """
    local, sent = observation.local, observation.gradient[name]
    if local.algorithm == "fedavg" and local.optimizer != "sgd":
        return sent
    mean = sent / local.summed_share(observation.batch_size // observation.cohort)
    return mean if isinstance(observation.transform, Rescaling) else mean - _decay(observation, name)


def _decay(observation: Observation, name: str) -> Tensor:
    """What weight decay adds to a parameter's gradient, in the first step of SGD."""
    decay = observation.local.weight_decay if observation.local.algorithm == "fedavg" else 0.0
    return decay * observation.model.get_parameter(name).detach().to(observation.gradient[name])


def _mean_prediction(observation: Observation) -> Float[Tensor, " classes"]:
    """Of random images."""
    images = torch.rand(_PROBES, *observation.image_shape, generator=torch.Generator().manual_seed(0))
    return _predictions(observation, images).mean(0)


def _mean_predictions(observation: Observation, own: Auxiliary) -> Float[Tensor, "classes classes"]:
    """Of the server's own images of each class; a class without any has the mean of all."""
    # In any order, as norms may take statistics of a batch, and data may lie class after class.
    chosen = torch.randperm(len(own.images), generator=torch.Generator().manual_seed(0))[:_OWN]
    predictions = _predictions(observation, own.images.cpu()[chosen])
    labels = own.labels.cpu()[chosen]
    of_class = [predictions[labels == label] for label in range(observation.classes)]
    return torch.stack([(each if len(each) else predictions).mean(0) for each in of_class])


@torch.no_grad()
def _predictions(observation: Observation, images: ImageBatch) -> Float[Tensor, "images classes"]:
    """Probabilities, on the CPU in float64."""
    model = probe_of(observation.model, train_mode=observation.train_mode)
    parts = images.chunk(math.ceil(len(images) / _PROBES))  # of like sizes: a norm may refuse a single image
    return torch.cat([model(as_taken(model, part)).double().softmax(1).cpu() for part in parts])


def _shares(
    predictions: Float[Tensor, "classes classes"],
    gradient: Float[Tensor, " classes"],
    *,
    pull: Float[Tensor, " classes"],
    clipped: bool,
) -> Float[Tensor, " classes"]:
    """Each class's share of a batch, up to a factor, none below 0, by least squares.

    Args:
        predictions: The mean of each class.
        gradient: Of the head's bias.
        pull: What weight decay adds to it before it is clipped.
        clipped: Whether it is up to a factor, which then is the sum of what is returned; else the sum is 1.
    """
    from scipy.optimize import nnls  # takes a while to import

    equations = predictions.T - torch.eye(len(gradient)).double() + pull[:, None]
    # A faint pull to a sum of 0 leaves out what need not be there: predictions cannot tell a batch of all
    # classes, just as often as they are predicted, from none.
    weight, total = (_FAINT, 0.0) if clipped else (_SURE, 1.0)
    matrix = torch.cat([equations, torch.full((1, len(gradient)), weight).double()])
    target = torch.cat([gradient, torch.tensor([weight * total]).double()])
    try:
        found, _ = nnls(matrix.numpy(), target.numpy(), maxiter=100 * len(gradient))
    except (ValueError, RuntimeError) as error:  # of predictions that are not finite, or without an end
        raise AttackError(f"Labels could not be counted ({error}). Grant the labels.") from error
    return torch.from_numpy(found)


def _rounded(expected: Tensor, total: int) -> Tensor:
    """Whole numbers near `expected` that sum up to `total`: the largest remainders are rounded up."""
    expected = expected if bool(expected.any()) else torch.ones_like(expected)  # nothing is known
    expected = expected * (total / expected.sum())
    counts = expected.floor()
    missing = total - int(counts.sum())
    counts[(expected - counts).topk(missing).indices] += 1
    return counts.long()
