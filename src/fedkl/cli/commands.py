"""What commands have in common: what they say on Ctrl-C, and of flags that they no longer have."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Mapping
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from fedkl.cli.terminal import say
from fedkl.errors import ConfigError, printable


def given(*names: str) -> str:
    """Which of the present command's options stand on its command line, as flags: ``--lr, --held-out``."""
    from click import get_current_context
    from click.core import ParameterSource

    context = get_current_context()
    here = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    return ", ".join("--" + name.replace("_", "-") for name in here)


BROKEN_PIPE = 141
"""Exit code where nobody takes what is printed: 128 and the number of SIGPIPE, as in a shell."""


class Commands(TyperGroup):
    """All commands; code of the user's that ends the program does not end them with a code of its own."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command.

        Raises:
            ConfigError: Something other than the command ended it.
        """
        try:
            return super().invoke(ctx)
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # rich's own answer, with exit code 1
                raise typer.Exit(BROKEN_PIPE) from end
            frames = traceback.extract_tb(end.__traceback__)
            where = [each for each in frames if not each.filename.startswith("<frozen")][-1]  # of exit()
            raise ConfigError(
                printable(
                    f"{where.filename}, line {where.lineno}: it ends the program (SystemExit: {end.code}). "
                    "Return, or raise an error, in what fedkl calls.",
                    limit=None,
                )
            ) from end
        except EOFError as error:  # typer takes it for Ctrl-D, with exit code 1
            raise ConfigError(
                printable(f"What was read ended too soon ({error}). Give the whole file, or the whole input.")
            ) from error


class Command(TyperCommand):
    """A command that Ctrl-C ends with exit code 130 and a line that says how to repeat it.

    Attributes:
        kept: What became of its work.
        removed: What flags that it once had are now.
    """

    kept: ClassVar[str] = "The command again:"
    removed: ClassVar[Mapping[str, str]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads the command's arguments.

        Raises:
            ConfigError: A flag is given that is no longer there.
        """
        given = dict.fromkeys(word.partition("=")[0] for word in args)
        gone = [f"{flag} is now {self.removed[flag]}" for flag in given if flag in self.removed]
        if gone and not ctx.resilient_parsing:  # a shell that completes shows no errors
            raise ConfigError(f"{'; '.join(gone)}. See fedkl {self.name} --help.")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            again = shlex.join(["fedkl", *sys.argv[1:]])
            say(printable(f"Interrupted. {self.kept.format(out=ctx.params.get('out'))} {again}", limit=None))
            raise typer.Exit(130) from None


class Continued(Command):
    """A command that goes on where it was interrupted."""

    kept = "What was finished is kept in {out}; the same command goes on:"
