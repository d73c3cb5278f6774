"""Files of one's own that register defenses, attacks, norms or datasets, for `fedkl --plugin FILE`."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

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
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # a file may import its neighbors, as the target of an audit may
        sys.path.insert(0, folder)
    before = {*ATTACKS, *DEFENSES, *registered_norms(), *DATASETS}
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"fedkl_plugin_{path.stem}_{place}"  # two files may have one name
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--plugin {path}: expected a Python file, *.py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            printable(f"--plugin {path}: the file fails with {type(error).__name__}: {error}")
        ) from error
    if {*ATTACKS, *DEFENSES, *registered_norms(), *DATASETS} == before:
        raise ConfigError(
            f"--plugin {path}: the file registers no defense, attack, norm or dataset. Put @register_defense "
            "(of fedkl.defenses) or @register_attack (of fedkl.attacks) above its dataclass, or "
            '@register_dataset("NAME") (of fedkl.data) above its function.'
        )
