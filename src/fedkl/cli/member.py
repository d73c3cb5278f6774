"""`fedkl member`: a member of masked federations, its secret file and its card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fedkl.cli.membership import PassphraseFileOption, WholeCommand, store_passphrase, tell, today
from fedkl.errors import ConfigError

app = typer.Typer(help="Members of masked federations: new, show.", no_args_is_help=True)


@app.command("new", cls=WholeCommand)
def member_new(
    name: Annotated[str, typer.Argument(help="The member's name, e.g. hospital-a.")],
    store: Annotated[
        Path | None,
        typer.Option(help="A node's store: the files go into its client's folder.", show_default="here"),
    ] = None,
    client: Annotated[str | None, typer.Option(help="With --store: the client.", show_default="NAME")] = None,
    passphrase_file: PassphraseFileOption = None,
) -> None:
    """Makes a member: NAME.secret, to be kept, and NAME.member, its card, to be sent around.

    The secret file is encrypted with FEDKL_PASSPHRASE, or else a passphrase of this user on this machine. In
    a node's store it is found without being named, and opens with the store's passphrase.
    """
    from fedkl.custody.member import new_member_of
    from fedkl.custody.store import client_folder
    from fedkl.masking.exchange import new_member, read_card
    from fedkl.passphrases import PASSPHRASE_VARIABLE, config_folder

    passphrase = store_passphrase(passphrase_file)
    if store is None:
        if client is not None:
            raise ConfigError("--client: expected together with --store, the node's store.")
        files = new_member(name, folder=Path(), passphrase=passphrase, today=today())
    else:
        folder = client_folder(store, client or name)
        files = new_member_of(folder, name, passphrase=passphrase, today=today())
    secret, card, fresh = files
    given = bool(os.environ.get(PASSPHRASE_VARIABLE))
    own = PASSPHRASE_VARIABLE if given else f"the passphrase in {config_folder() / 'passphrase'}"
    where = own if passphrase_file is None else f"the passphrase in {passphrase_file}"
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
