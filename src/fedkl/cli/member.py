"""`fedkl member`: a member of masked federations, its secret file and its card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fedkl.cli.membership import WholeCommand, tell, today

app = typer.Typer(help="Members of masked federations: new, show.", no_args_is_help=True)


@app.command("new", cls=WholeCommand)
def member_new(
    name: Annotated[str, typer.Argument(help="The member's name, e.g. hospital-a.")],
) -> None:
    """Makes a member in this folder: NAME.secret, to be kept, and NAME.member, its card, to be sent around.

    The secret file is encrypted with FEDKL_PASSPHRASE, or else a passphrase of this user on this machine.
    """
    from fedkl.lockfile import PASSPHRASE_VARIABLE, config_folder, default_passphrase
    from fedkl.masking.exchange import new_member, read_card

    secret, card, fresh = new_member(name, folder=Path(), passphrase=default_passphrase(), today=today())
    given = bool(os.environ.get(PASSPHRASE_VARIABLE))
    where = PASSPHRASE_VARIABLE if given else f"the passphrase in {config_folder() / 'passphrase'}"
    made = "keep it, and make a backup" if fresh else "was here already, its keys stay"
    tell(f"{secret}: {made}. It opens with {where} only.")
    tell(f"{card}: send it to the others. Good until {read_card(card).expires}.")


@app.command("show", cls=WholeCommand)
def member_show(path: Annotated[Path, typer.Argument(help="A card, NAME.member.")]) -> None:
    """Checks a card, and says whose it is."""
    from fedkl.masking.cards import CARD_DAYS, date_problem
    from fedkl.masking.exchange import read_card
    from fedkl.masking.expiry import card_notice

    card = read_card(path)
    problem = date_problem(card.expires, today=today(), days=CARD_DAYS)
    good = f"{problem}: ask for a new one" if problem else f"good until {card.expires}"
    tell(f"{path}: the card of {card.name}, whole, {good}.")
    if notice := card_notice(card, today=today()):
        tell(notice)
