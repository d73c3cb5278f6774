"""Files of one's own that register defenses, attacks, norms or datasets, for `fedkl --plugin FILE`."""

from __future__ import annotations

from pathlib import Path

from fedkl import scripts
from fedkl.errors import ConfigError, printable


def load(path: Path) -> None:
    """Runs a file, which registers what it has.

    Raises:
        ConfigError: There is none, it fails, or it registers nothing.
    """
    from fedkl.attacks import ATTACKS
    from fedkl.data import DATASETS
    from fedkl.defenses import DEFENSES
    from fedkl.norms import registered_norms

    if not path.is_file():
        raise ConfigError(f"--plugin {path}: no such file.")
    before = {*ATTACKS, *DEFENSES, *registered_norms(), *DATASETS}
    spec = scripts.spec_of(path, role="plugin")
    if spec is None:
        raise ConfigError(f"--plugin {path}: expected a Python file, *.py.")
    try:
        scripts.run(spec)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            printable(f"--plugin {path}: the file fails with {type(error).__name__}: {error}")
        ) from error
    if {*ATTACKS, *DEFENSES, *registered_norms(), *DATASETS} == before:
        raise ConfigError(
            f"--plugin {path}: the file registers no defense, attack, norm or dataset. Put @register_defense "
            "(of fedkl.defenses) or @register_attack (of fedkl.attacks) above its dataclass, or "
            '@register_dataset("NAME") (of fedkl.data) above its function.'
        )
