"""What a command does on Ctrl-C: it says what is kept, and what goes on."""

from __future__ import annotations

import shlex
import sys
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand

from fedkl.cli.terminal import say
from fedkl.errors import printable


class Command(TyperCommand):
    """A command that Ctrl-C ends with exit code 130 and a line that says how to repeat it.

    Attributes:
        kept: What became of its work.
    """

    kept: ClassVar[str] = "The command again:"

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
