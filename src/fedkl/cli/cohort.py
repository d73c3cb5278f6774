"""`fedkl cohort`: who adds up updates that the server cannot read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.panel import Panel

from fedkl.cli.commands import given
from fedkl.cli.membership import MemberOption, PassphraseFileOption, WholeCommand, opened, tell, today
from fedkl.cli.terminal import console
from fedkl.errors import MaskingError

if TYPE_CHECKING:
    from fedkl.masking import MemberFile, Roster, SealedRoster

app = typer.Typer(help="Cohorts of masked federations: new, join, change, end, show.", no_args_is_help=True)

Mode = Literal["blind", "pairwise", "both"]
"""As `fedkl.masking.Mode`."""

CohortArgument = Annotated[Path, typer.Argument(help="The cohort's file, NAME.cohort.")]


@app.command("new", cls=WholeCommand)
def cohort_new(
    path: Annotated[Path, typer.Argument(help="Where to, NAME.cohort.")],
    cards: Annotated[list[Path], typer.Argument(help="Cards of all members, also one's own: *.member.")],
    mode: Annotated[Mode, typer.Option(help="Which masks; see docs/masked.md.")] = "blind",
    minimum: Annotated[int, typer.Option(min=3, max=1000, help="Fewest members in a sum.")] = 3,
    max_samples: Annotated[
        int, typer.Option(min=1, max=2**20, help="Most samples of one member's update.")
    ] = 2**20,
    sampled: Annotated[bool, typer.Option("--sampled", help="Rounds may ask only some members.")] = False,
    server_model: Annotated[
        bool, typer.Option("--server-model", help="The server may change the model; with pairwise only.")
    ] = False,
    bits: Annotated[Literal["64", "32"], typer.Option(help="Of a word; 32 for large models.")] = "64",
    member: MemberOption = None,
    passphrase_file: PassphraseFileOption = None,
) -> None:
    """Founds a cohort of the members whose cards are given, and writes its file, to be sent to all."""
    from fedkl.masking import Rules
    from fedkl.masking.exchange import found_cohort

    if bits == "32" and not given("max_samples"):
        raise typer.BadParameter(
            "--bits 32: weights of clients have 12 bits there, and are rounded. Give --max-samples: the "
            "images of the member that has most, or a little more."
        )
    rules = Rules(
        mode=mode,
        bits=32 if bits == "32" else 64,
        minimum=minimum,
        max_samples=max_samples,
        sampled=sampled,
        server_model=server_model,
    )
    with opened(member, passphrase_file) as file:
        sealed = found_cohort(path, cards=cards, rules=rules, signer=file.keys, today=today())
    _describe(sealed)
    tell(f"Send {path} to all of them, by any way. Then each, you too: fedkl cohort join {path.name}")


@app.command("join", cls=WholeCommand)
def cohort_join(
    path: CohortArgument,
    fingerprint: Annotated[
        str | None,
        typer.Option(
            help="As the others read it, five groups of four, in quotes; nobody is asked then.",
            show_default="asks",
        ),
    ] = None,
    member: MemberOption = None,
    passphrase_file: PassphraseFileOption = None,
) -> None:
    """Joins a cohort, or its next epoch.

    The first time, all members compare the fingerprint by phone. If all read the same one, nobody exchanged
    the file on its way. A later epoch is signed by a member of the one before. It is compared again if its
    rules differ. With pairwise masks, and with both, it is also compared if its members differ.
    """
    from fedkl.custody.journal import journal_beside
    from fedkl.custody.member import check_clock
    from fedkl.masking.exchange import read_cohort
    from fedkl.masking.expiry import FINISH_FIRST

    with opened(member, passphrase_file) as file:
        check_clock(file.path.parent)
        sealed = read_cohort(path)
        file.check(sealed, today=today())
        roster = sealed.roster
        if file.is_joined(sealed) and fingerprint in (None, roster.fingerprint):
            tell(f"{path}: epoch {roster.epoch} of {roster.name} is joined already. Nothing was changed.")
            return
        _describe(sealed)
        before = file.cohorts.get(roster.name)
        if before is not None:
            _tell_change(sealed, before.roster)
            tell(FINISH_FIRST)
        if fingerprint is None and file.needs_fingerprint(sealed):
            fingerprint = _compared(path, roster)
        file.join(sealed, today=today(), fingerprint=fingerprint)
        tell(f"{file.path}: {file.keys.name} has joined {roster.name}, epoch {roster.epoch}.")
        journal = journal_beside(file.path)
        if journal is not None:
            journal.note("cohort joined", about=f"{roster.name}, epoch {roster.epoch}")
        _tell_whether_it_takes_part(file, roster.name)


@app.command("change", cls=WholeCommand)
def cohort_change(
    path: CohortArgument,
    add: Annotated[list[Path] | None, typer.Option(help="Card of a new member. May be repeated.")] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="Name of a member who leaves. May be repeated.")
    ] = None,
    member: MemberOption = None,
    passphrase_file: PassphraseFileOption = None,
) -> None:
    """Makes the cohort's next epoch: other members, a new key, another 90 days.

    Without --add and --remove the members stay. To exchange a member's card, remove and add it at once.
    """
    from fedkl.masking.exchange import change_cohort
    from fedkl.masking.expiry import FINISH_FIRST

    with opened(member, passphrase_file) as file:
        before = file.cohorts
        sealed, copy = change_cohort(path, add=add or (), remove=remove or (), member=file, today=today())
        _describe(sealed)
        _tell_change(sealed, before[sealed.roster.name].roster)
    tell(f"{copy}: the epoch before, for members who have not joined it yet; the others need it no more.")
    tell(FINISH_FIRST)
    tell(f"Send {path} to all members. Then each, you too: fedkl cohort join {path.name}")


@app.command("end", cls=WholeCommand)
def cohort_end(
    path: CohortArgument, member: MemberOption = None, passphrase_file: PassphraseFileOption = None
) -> None:
    """Destroys this member's copy of the cohort's key. It does not take part any more.

    The file may be gone: its name is enough.
    """
    from fedkl.masking.exchange import COHORT_SUFFIX, read_cohort

    with opened(member, passphrase_file) as file:
        name = path.name.removesuffix(COHORT_SUFFIX)
        if path.exists() or name not in file.cohorts:
            name = read_cohort(path).roster.name
        file.end(name)
        tell(f"{file.path}: the key of {name} is destroyed here, and is not taken in again.")
    _tell_limits(name)


@app.command("show", cls=WholeCommand)
def cohort_show(path: CohortArgument) -> None:
    """Says who is in a cohort, by which rules, until when, and its fingerprint."""
    from fedkl.masking.exchange import read_cohort
    from fedkl.masking.expiry import notices

    sealed = read_cohort(path)
    _describe(sealed)
    for notice in notices(sealed.roster, today=today()):
        tell(notice)
    _show_fingerprint(sealed.roster)


def _describe(sealed: SealedRoster) -> None:
    roster, rules = sealed.roster, sealed.roster.rules
    asked = "may ask some members only" if rules.sampled else "ask all members"
    server = "may change" if rules.server_model else "cannot change"
    made = "signed by" if sealed.signed_by_one_of(roster) else "it says by"
    tell(f"Cohort {roster.name}, epoch {roster.epoch}, {made} {sealed.signer}, {_until(roster.expires)}.")
    tell(
        f"Masks: {rules.mode}, words of {rules.bits} bits. Sums of {rules.minimum} members or more, "
        f"each with at most {rules.max_samples} samples. Rounds {asked}; the server {server} the model."
    )
    tell(f"{len(roster.cards)} members:")
    for card in roster.cards:
        tell(f"  {card.name}, card {_until(card.expires)}")


def _until(day: object) -> str:
    return f"good until {day}" if str(day) >= today().isoformat() else f"EXPIRED on {day}"


def _tell_change(sealed: SealedRoster, before: Roster) -> None:
    after = sealed.roster
    added = [card.name for card in after.cards if card != before.card_of.get(card.name)]
    gone = [card.name for card in before.cards if card != after.card_of.get(card.name)]
    changes = ("New", added), ("Gone", gone)
    told = [f"{what}: {', '.join(names)}." for what, names in changes if names]
    rules = [] if after.rules == before.rules else ["THE RULES ARE NOT THOSE of the epoch before."]
    tell(" ".join([*(told or ["The members stay."]), *rules, "The key is a new one."]))


def _show_fingerprint(roster: Roster) -> None:
    large = "     ".join(" ".join(group) for group in roster.fingerprint.split())
    console.print(Panel.fit(f"[bold]{large}[/]", title="Fingerprint", padding=(1, 4)), highlight=False)
    tell(f"Fingerprint: {roster.fingerprint}")


def _compared(path: Path, roster: Roster) -> str:
    """The fingerprint, after somebody has said that the others read the same."""
    _show_fingerprint(roster)
    try:
        same = typer.confirm("Do the others read the same?", default=False)
    except typer.Abort as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise MaskingError(
            f"{path}: not joined: nobody has answered. In a script, give the fingerprint that the others "
            'read: --fingerprint "XXXX XXXX XXXX XXXX XXXX".'
        ) from None
    if not same:
        raise MaskingError(
            f"{path}: not joined. If the others read something else, the file was exchanged on its way: have "
            "it sent again, another way, and compare again."
        )
    return roster.fingerprint


def _tell_whether_it_takes_part(file: MemberFile, cohort: str) -> None:
    try:
        file.memory(cohort)
    except MaskingError as error:  # restored: see fedkl.masking.contents
        tell(f"It takes no part yet. {error}")


def _tell_limits(name: str) -> None:
    tell(
        "Not destroyed: backups of this secret file, what the disk keeps of its earlier versions, and the "
        f"other members' copies. Copies of {name}.cohort hold the key too: with this secret file and its "
        "passphrase they give it again. Whoever has the key and recorded what was sent can read what the "
        "key alone protected."
    )
