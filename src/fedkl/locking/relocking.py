"""A model that `bake()` made is locked again: what was private stays so."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedkl.errors import SecretError, gathered
from fedkl.locking import norms
from fedkl.locking.options import LockOptions
from fedkl.locking.targets import Target
from fedkl.locking.withholding import released
from fedkl.norms import statistics_names


def check_stays_private(model: nn.Module, chosen: Sequence[Target], *, options: LockOptions) -> None:
    """Refuses a lock under which something would be sent that a lock kept private before.

    Args:
        model: Before it is locked; not changed.
        chosen: What is to be locked.
        options: How.

    Raises:
        SecretError: With the names of these tensors.
    """
    own = {id(module) for name in options.private for module in model.get_submodule(name).modules()}
    locked = {id(each.module): norms.generated_names(each.module) for each in chosen if not each.inserts}
    problems = [
        f"'{full}'"
        for module, name, full in released(model)
        if id(module) not in own
        and name not in locked.get(id(module), ())
        and (options.share_statistics or name not in statistics_names(module))
    ]
    if problems:
        summary = "lock: the model is one client's own, made by bake(), and these would be sent."
        remedy = "Lock the same layers again, with the same private= and share_statistics=, or a plain model."
        raise SecretError(gathered(summary, problems, remedy))
