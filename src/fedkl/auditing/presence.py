"""Whether an image was among those that a client trained on, as a server tells it from the update alone.

Two scores of every layer, and one of all. With A the second moments of the layer's inputs, B those of what
the loss sends back (both of the server's own images), Δ the layer's part of the update, and whitened
Δ̃ = B^{-½} Δ A^{-½}:

* span: the share of the candidate's whitened inputs that lies in the row space of Δ A^{-½}. A sum of outer
  products δ aᵀ has the inputs of the client's images in its row space. No label, no backward pass.
* ratio: the cosine of Δ̃ and the candidate's own whitened gradient, the likelihood ratio of "its gradient is
  in the sum" with the layer's gradients taken as Gaussian of covariance B ⊗ A, without the norm.
* match: the inner product of the update and the candidate's whole gradient, over its norm: the likelihood
  ratio where noise of one size in every entry, as differential privacy adds it, is all that hides it.

What weight each score has, the server learns from clients that it plays itself, by logistic regression. So
nothing is chosen by looking at the truth.

Source:
    The span: Li et al., "Effective passive membership inference attacks in federated learning against
    overparameterized models", ICLR 2023 (gradients of different images are nearly orthogonal); here on the
    inputs, whitened. The covariance B ⊗ A: Martens and Grosse, "Optimizing neural networks with
    Kronecker-factored approximate curvature", 2015.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fedkl.attacks.memory import at_once
from fedkl.auditing.rows import Layer, layers_of, looked_at, rows_of
from fedkl.errors import DataError, shown

_RIDGE = 1e-3  # of the mean eigenvalue
_RANK = 1e-4  # singular values below this share of the largest are rounding
_MOMENTS = 640  # inputs of a layer up to which second moments always fit into memory
_PLACES = 64  # of an image, from which moments are taken: neighbors are alike
_PENALTY = 1.0  # of squared weights, for standardized scores
_FARTHEST = 10.0  # standard deviations from images that were not trained on; beyond, a score says no more
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Whitening:
    """What makes a layer's inputs, and what comes back, uncorrelated and of one size on the server's images.

    Attributes:
        inputs: A^{-½}, shape ``(inputs, inputs)``.
        outputs: B^{-½}, shape ``(outputs, outputs)``.
    """

    inputs: Tensor = field(repr=False)
    outputs: Tensor = field(repr=False)


class LayerScores:
    """All scores.

    Args:
        model: The classifier at the weights that clients received, as far as the server knows it.
        observed: An update, of which names and shapes are read.
        images: The server's own.
        labels: Theirs.

    Raises:
        DataError: The network has no layer of which there are scores.
    """

    def __init__(
        self, model: nn.Module, observed: Mapping[str, Tensor], *, images: Tensor, labels: Tensor
    ) -> None:
        self._model = model
        called = layers_of(model, observed)
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        always = {layer.name for layer in called}
        for chunk in rows_of(model, images, labels, layers=called):
            always &= chunk.keys()
            for name, rows in chunk.items():
                places = slice(None, None, -(-rows.inputs.shape[1] // _PLACES))
                a, b = (_second_moment(each[:, places]) for each in (rows.inputs, rows.outputs))
                before = moments.get(name, (torch.zeros_like(a), torch.zeros_like(b)))
                moments[name] = (before[0] + a, before[1] + b)
        self.layers: list[Layer] = [layer for layer in called if layer.name in always]
        if not self.layers:
            raise DataError(
                "Presence: expected a linear layer or an ungrouped convolution whose weight is sent, is "
                "trained and has at most 4,096 inputs, one dimension of which is that of the images, got a "
                "network without. Images are looked for in those only."
            )
        self._whitening = {
            name: Whitening(inputs=_inverse_root(a), outputs=_inverse_root(b))
            for name, (a, b) in moments.items()
            if name in always
        }

    @property
    def names(self) -> list[str]:
        """Of the scores, as in the last dimension of what a call returns."""
        return [f"{score} {layer.name}" for layer in self.layers for score in ("span", "ratio")] + ["match"]

    def __call__(self, updates: Sequence[Mapping[str, Tensor]], images: Tensor, labels: Tensor) -> Tensor:
        """Scores of candidates under updates.

        Args:
            updates: By tensor name; each of a client's or a sum of several.
            images: The candidates.
            labels: Theirs.

        Returns:
            Shape ``(updates, images, scores)``; span is between 0 and 1, ratio between −1 and 1, match in the
            update's unit.

        Raises:
            DataError: Some of these images do not go through a layer that all the server's own go through.
        """
        return self.under(updates)(images, labels)

    def under(self, updates: Sequence[Mapping[str, Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
        """The same for several lots of candidates: what is computed of the updates serves all of them."""
        observed = {layer.name: self._of(layer, updates) for layer in self.layers}
        return partial(self._scored, observed)

    def _scored(
        self, observed: Mapping[str, tuple[_Spans, Tensor, Tensor]], images: Tensor, labels: Tensor
    ) -> Tensor:
        found = []
        for chunk in rows_of(self._model, images, labels, layers=self.layers):
            scores, products, squares = [], torch.tensor(0.0), torch.tensor(0.0)
            for layer in self.layers:
                if layer.name not in chunk:
                    raise DataError(
                        f"Presence: expected that all images go through {shown(layer.name)}, some do not. "
                        "Give a network whose way does not depend on the image."
                    )
                rows, white = chunk[layer.name], self._whitening[layer.name]
                inputs, outputs = rows.inputs @ white.inputs, rows.outputs @ white.outputs
                energy = inputs.square().sum((1, 2)).clamp_min(_TINY)
                own = torch.einsum("npo,npi->noi", outputs, inputs).flatten(1)
                own = own / own.norm(dim=1, keepdim=True).clamp_min(_TINY)
                spans, directions, plain = observed[layer.name]
                scores += [spans.captured(inputs) / energy, directions @ own.T]
                gradients = torch.einsum("npo,npi->noi", rows.outputs, rows.inputs).flatten(1)
                products = products + plain @ gradients.T
                squares = squares + gradients.square().sum(1)
            scores.append(products / squares.sqrt().clamp_min(_TINY))
            found.append(torch.stack(scores, -1))
        return torch.cat(found, 1)

    def _of(self, layer: Layer, updates: Sequence[Mapping[str, Tensor]]) -> tuple[_Spans, Tensor, Tensor]:
        """The whitened row spaces of updates, their whitened directions, a row each, and they themselves."""
        white, bases, directions = self._whitening[layer.name], [], []
        for update in updates:
            rows = layer.matrix(update) @ white.inputs
            _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
            bases.append(basis[sizes > _RANK * sizes[0]].T)
            whole = (white.outputs @ rows).flatten()
            directions.append(whole / whole.norm().clamp_min(_TINY))
        plain = torch.stack([layer.matrix(update).flatten() for update in updates])
        return _Spans(bases), torch.stack(directions), plain


class _Spans:
    """Subspaces of a layer's inputs, one for each update.

    Args:
        bases: Orthonormal, shape ``(inputs, rank)`` each.
    """

    def __init__(self, bases: Sequence[Tensor]) -> None:
        self._bases = bases
        self._rank = sum(basis.shape[1] for basis in bases)
        self._projectors: Tensor | None = None

    def captured(self, inputs: Tensor) -> Tensor:
        """The squared length of what lies in each subspace, over all places.

        Args:
            inputs: Shape ``(images, places, inputs)``.

        Returns:
            Shape ``(updates, images)``.
        """
        places, width = inputs.shape[1:]
        if places * self._rank < (places + len(self._bases)) * width or not self._fit(width):
            return torch.stack([(inputs @ basis).square().sum((1, 2)) for basis in self._bases])
        # The same by way of the images' second moments, which serve all updates.
        if self._projectors is None:
            self._projectors = inputs.new_empty(len(self._bases), width**2)
            for place, basis in enumerate(self._bases):
                self._projectors[place] = (basis @ basis.T).flatten()
        most = len(inputs) if width <= _MOMENTS else at_once(2 * 4 * width**2)
        parts = inputs.split(most)  # type: ignore[no-untyped-call]
        return torch.cat([self._projectors @ (part.mT @ part).flatten(1).T for part in parts], 1)

    def _fit(self, width: int) -> bool:
        """Whether there is memory for all projectors, with three times as much for what else is done."""
        if width <= _MOMENTS or self._projectors is not None:
            return True
        return at_once(4 * width**2) > 2 * len(self._bases)


def _second_moment(rows: Tensor) -> Tensor:
    flat = rows.flatten(0, 1)
    moment: Tensor = (flat.T @ flat).double()  # of a chunk; many chunks are summed in double
    return moment


def _inverse_root(moments: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp_min(0)
    scale = (values + _RIDGE * values.mean().clamp_min(_TINY)).rsqrt()
    root: Tensor = ((vectors * (scale / scale.mean())) @ vectors.T).float()
    return root


class PresenceTest:
    """The scores of all layers as one number, with weights from clients that the server played.

    Args:
        scores: Of the layers.
        played: Updates of clients that the server played.
        members: Which of `images` each trained on; shape ``(updates, images)``, bool.
        images: The server's own.
        labels: Theirs.
    """

    def __init__(
        self,
        scores: LayerScores,
        *,
        played: Sequence[Mapping[str, Tensor]],
        members: Tensor,
        images: Tensor,
        labels: Tensor,
    ) -> None:
        self._scores = scores
        found = scores(played, images, labels)
        null = [_null(each[~member]) for each, member in zip(found, members, strict=True)]
        standard = torch.stack([(each - mean) / std for each, (mean, std) in zip(found, null, strict=True)])
        # Where these images are fewer than a layer's inputs, whitening by them makes them orthogonal: those
        # that were not trained on all have the same span, others are 1e10 deviations away, and no fit ends.
        standard = standard.clamp(-_FARTHEST, _FARTHEST)
        self.weights = _fitted(standard.flatten(0, 1), members.flatten())

    def looked_at(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What it needs of an update."""
        return looked_at(self._scores.layers, update)

    def both(
        self,
        updates: Sequence[Mapping[str, Tensor]],
        *,
        kept_back: tuple[Tensor, Tensor],
        images: Tensor,
        labels: Tensor,
        by_class: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """How much speaks for each image that the server kept back, and for each candidate.

        No client trained on what was kept back, and nothing was learned from it: under every update these
        images have mean 0 and standard deviation 1 in each score, and say how often an image that was not
        trained on reaches a threshold.

        Args:
            updates: By tensor name.
            kept_back: Images and labels.
            images: The candidates.
            labels: Theirs.
            by_class: Whether the mean 0 is of each class by itself: an update tells which classes a client
                has, and an image of one of these is not therefore its own.

        Returns:
            Shapes ``(updates, images kept back)`` and ``(updates, images)``.
        """
        scores = self._scores.under(updates)
        null, found = scores(*kept_back), scores(images, labels)
        if by_class:
            _center_by_class(null, found, kept_back[1], labels)
        mean, std = null.mean(1, keepdim=True), null.std(1, keepdim=True).clamp_min(_TINY)
        return ((null - mean) / std) @ self.weights, ((found - mean) / std) @ self.weights


def _null(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over images that were not trained on."""
    return scores.mean(0), scores.std(0).clamp_min(_TINY)


def _center_by_class(null: Tensor, found: Tensor, kept_back: Tensor, labels: Tensor) -> None:
    """Takes the mean of each class's kept-back images off, in place.

    The mean of k images is not exact: one that is in it is nearer to it than another, by
    √((1 − 1/k) / (1 + 1/k)), and false alarms would be more than those that the threshold is set for. So each
    is held against the mean of the others, and all are scaled to one deviation. Classes with one image, or
    none, are held against the mean of all.

    Args:
        null: Scores of what was kept back, shape ``(updates, images, scores)``.
        found: Of the candidates, likewise.
        kept_back: Labels of the first.
        labels: Of the second.
    """
    of_all = null.mean(1, keepdim=True)
    for label in set(kept_back.tolist()):
        mine, same = kept_back == label, labels == label
        k = int(mine.sum())
        if k < 2:
            null[:, mine] -= of_all
            found[:, same] -= of_all
            continue
        center = null[:, mine].mean(1, keepdim=True)
        null[:, mine] = (null[:, mine] - center) * math.sqrt(k / (k - 1))
        found[:, same] = (found[:, same] - center) / math.sqrt(1 + 1 / k)
    found[:, ~torch.isin(labels, kept_back)] -= of_all


def _fitted(scores: Tensor, members: Tensor) -> Tensor:
    """Logistic regression with a squared penalty; both classes count the same."""
    wanted = members.to(scores.dtype)
    balance = torch.where(members, 0.5 / wanted.mean(), 0.5 / (1 - wanted.mean()))
    weights = torch.zeros(scores.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        said = scores @ weights[:-1] + weights[-1]
        loss = nn.functional.binary_cross_entropy_with_logits(said, wanted, weight=balance)
        loss = loss + _PENALTY * weights[:-1].square().sum() / max(1, int(wanted.sum()))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights[:-1].detach()
