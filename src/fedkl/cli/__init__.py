"""The command line: parses arguments, shows progress and errors; no logic of its own.

PyTorch and what needs it take seconds to import. So nothing here imports them before a command runs: `--help`
and `--version` answer at once.

    entry.py      the app, `main` and its exit codes
    commands.py   what every command does on Ctrl-C
    options.py    options that several commands have
    terminal.py   progress, tables, messages
    membership.py what `fedkl member`, `fedkl cohort` and `fedkl store` have in common
    plugins.py    files of one's own that register defenses and attacks
    train.py attack.py audit.py demo.py report.py export.py data.py key.py member.py cohort.py store.py
    generator.py reproduce.py adaptive.py defenses.py
                  one command, or group of commands, each
"""

from fedkl.cli.entry import app, main

__all__ = ["app", "main"]
