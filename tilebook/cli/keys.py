"""The commands about keys, by which exports are signed and trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tilebook.cli.common import FORMAT, example, main, print_json

if TYPE_CHECKING:
    from tilebook.registry.signing import Key


@main.group(
    epilog=example(
        "tilebook keys make",
        "tilebook export verdicts.jsonl --sign mine",
        "tilebook keys trust colleague.pub",
    )
)
def keys() -> None:
    """Keys by which exports are signed, and whose exports are served without being verified here first.

    They are Ed25519 keys as OpenSSH has them: a public one is a line of text, which you give to others, and its
    fingerprint is what `ssh-keygen -l` says.
    """


@keys.command("make", epilog=example("tilebook keys make", "tilebook keys make release"))
@click.argument("name", default="mine")
def make(name: str) -> None:
    """Makes a key of your own, called NAME (default: mine), and prints the public half of it."""
    from tilebook.registry import signing

    place, key = signing.make(name)
    click.echo(key.line)
    click.echo(
        f"{key.fingerprint} made: {place} signs, and is for nobody else; {place.name}.pub is for others", err=True
    )


@keys.command("show", epilog=example("tilebook keys show"))
@FORMAT
def show(format_: str) -> None:
    """Prints your own keys and those that you trust, with their fingerprints."""
    from tilebook.registry import signing

    rows = [{"which": "own", "place": str(place), **_row(key)} for place, key in signing.own()]
    rows += [{"which": "trusted", **_row(key)} for key in signing.trusted()]
    if format_ == "json":
        print_json(rows)
        return
    for each in rows:
        click.echo(f"{each['which']:8} {each['fingerprint']} {each['name']}".rstrip())
    if not rows:
        click.echo("no keys: `tilebook keys make` makes one, `tilebook keys trust` trusts somebody's")


def _row(key: Key) -> dict[str, str]:
    return {"name": key.name, "fingerprint": key.fingerprint, "key": key.line}


@keys.command(
    "trust", epilog=example("tilebook keys trust colleague.pub", "tilebook keys trust verdicts.jsonl --name 'the team'")
)
@click.argument("key")
@click.option(
    "--name",
    metavar="NAME",
    help="What it is called here (default: what its line says, or the file's name where that is nothing or `mine`).",
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask first.")
def trust(key: str, name: str | None, yes: bool) -> None:
    """Trusts KEY from now on: what it has signed is served when it is imported, as with --trust.

    KEY is a public key's file or the key itself, 'ssh-ed25519 AAAA…', or a signed export, whose key is meant. Compare
    the fingerprint with what its owner says. Trusted keys stand in one file, `trusted_keys` in tilebook's folder of
    settings, a key a line.
    """
    from tilebook.registry import signing

    found = signing.read_key(key)
    if name is None and found.name in ("", "mine"):  # as everybody's own is called
        name = signing.name_of(key) or found.name
    if name:
        found = signing.read_key(f"ssh-ed25519 {found.text} {name}")
    if not yes:
        click.confirm(f"Trust all that is signed by {found}?", abort=True, err=True)
    new = signing.trust(found)
    known = next((each for each in signing.trusted() if each.text == found.text), found)
    click.echo(f"{known} is trusted{'' if new else ' already'}: see {signing.trusted_place()}", err=True)
    if not new and known.name != found.name:
        click.echo(f"it stays {known.name or 'without a name'}: to call it {found.name}, forget it first", err=True)


@keys.command("forget", epilog=example("tilebook keys forget 'the team'"))
@click.argument("key")
def forget(key: str) -> None:
    """Trusts KEY no longer, a name, a fingerprint or a file. What has been imported stays: see `tilebook remove`."""
    from tilebook.errors import UsageError
    from tilebook.registry import signing

    gone = signing.forget(key)
    if not gone and Path(key).is_file():
        gone = signing.forget(signing.read_key(key).text)
    if not gone:
        raise UsageError(f"no key that is trusted is called {key}: see `tilebook keys show`")
    for each in gone:
        click.echo(f"{each} is not trusted any more", err=True)
