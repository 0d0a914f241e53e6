"""Signatures of exports: Ed25519 keys as OpenSSH writes them, and those that a user trusts.

An export's header has the digest of all that follows, and a signature is of the header: it is known to be good before
the first record is read, and to sign takes as much memory for many records as for one. `cryptography` is imported when
something is signed or a signature is looked at.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilebook.errors import RegistryError, UsageError
from tilebook.registry import checks
from tilebook.registry.checks import Json, quoted
from tilebook.registry.target import settings_folder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_KIND = "ssh-ed25519"
_BEGIN = len(_KIND).to_bytes(4) + _KIND.encode() + (32).to_bytes(4)
_MOST = 64 << 10
"""Bytes of a file with keys that are read."""


@dataclass(frozen=True)
class Key:
    """A public key, and what it is called, which is no part of it. `text` is how OpenSSH writes its bytes."""

    text: str
    name: str = ""

    @classmethod
    def of(cls, line: str) -> Key:
        """From a line `ssh-ed25519 AAAA… name`, as in authorized_keys. Raises ValueError."""
        kind, text, name = (*line.split(None, 2), "", "", "")[:3]
        try:
            blob = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            blob = b""
        if "\n" in line.strip() or kind != _KIND or not blob.startswith(_BEGIN) or len(blob) != len(_BEGIN) + 32:
            raise ValueError(f"not a public key such as 'ssh-ed25519 AAAA… name': {quoted(line)}")
        return cls(base64.b64encode(blob).decode(), name and checks.label(name.strip(), "the key's name"))

    @property
    def raw(self) -> bytes:
        return base64.b64decode(self.text)[len(_BEGIN) :]

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` has it."""
        digest = hashlib.sha256(base64.b64decode(self.text)).digest()
        return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"

    @property
    def line(self) -> str:
        return f"{_KIND} {self.text} {self.name}".rstrip()

    def __str__(self) -> str:
        return f"{self.name} ({self.fingerprint})" if self.name else self.fingerprint


@dataclass(frozen=True)
class Signature:
    """What an export's header says of who signed it. checked: whether `cryptography` was here to look at it."""

    key: Key
    value: bytes
    checked: bool = False

    @classmethod
    def of(cls, content: object) -> Signature:
        """From the header. Raises ValueError."""
        fields = checks.fields(content, "signature", ("key", "value"))
        try:
            value = base64.b64decode(fields["value"], validate=True)
        except (TypeError, ValueError):
            value = b""
        if type(fields["key"]) is not str or len(value) != 64:
            raise ValueError("the signature is none of Ed25519")
        return cls(Key(Key.of(f"{_KIND} {fields['key']}").text), value)

    @property
    def trusted(self) -> Key | None:
        """The key as the user who trusts it has named it; None where the user does not."""
        return next((each for each in trusted() if each.text == self.key.text), None)


Sign = Callable[[str], Mapping[str, Json]]
"""Text → the signature's fields in a header."""


def checked(signature: Signature, text: str, needed: bool) -> Signature:
    """The signature once it has been looked at; as it is where `cryptography` is not installed and it is not needed.

    Raises RegistryError where it is none of this text.
    """
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ModuleNotFoundError:
        if needed:
            raise
        return signature
    try:
        Ed25519PublicKey.from_public_bytes(signature.key.raw).verify(signature.value, text.encode())
    except (InvalidSignature, ValueError):
        raise RegistryError(f"the signature by {signature.key.fingerprint} is wrong: nothing is taken of it") from None
    return Signature(signature.key, signature.value, checked=True)


def signer(name: str) -> tuple[Sign, Key]:
    """What signs with a private key, one of `keys make`'s by its name or a file of OpenSSH's; and the public one.

    Raises UsageError, OSError.
    """
    place = own_place(name) if _is_name(name) and own_place(name).exists() else Path(name)
    if not place.exists():
        raise UsageError(f"there is no key {name}, and no file that is called so: `tilebook keys make` makes one")
    private = _private(place)
    key = _public(private, place.name)

    def sign(text: str) -> Mapping[str, Json]:
        return {"key": key.text, "value": base64.b64encode(private.sign(text.encode())).decode()}

    return sign, key


def make(name: str) -> tuple[Path, Key]:
    """A new key of the user's: the file of the private one, which nobody else can read, and the public one."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    place, private = own_place(name), Ed25519PrivateKey.generate()
    key = _public(private, name)
    text = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    for folder in (place.parent.parent, place.parent):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        made = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UsageError(f"there is a key {name} already: {place}") from None
    try:
        with _named(place), open(made, "wb") as file:
            file.write(text)
        place.with_name(f"{name}.pub").write_text(f"{key.line}\n", encoding="utf-8")
    except BaseException:  # half a key would be in the way of the next
        place.unlink(missing_ok=True)
        raise
    return place, key


def own() -> list[tuple[Path, Key]]:
    """The keys that `make` has made, with the files of the private ones."""
    found = []
    with contextlib.suppress(RegistryError):
        for file in sorted((settings_folder() / "keys").glob("*.pub")):
            with contextlib.suppress(ValueError):
                found.append((file.with_name(file.name.removesuffix(".pub")), Key.of(_text(file))))
    return found


def own_place(name: str) -> Path:
    """Where the user's key of that name is. Raises UsageError, RegistryError."""
    if not _is_name(name):
        raise UsageError(f"{quoted(name)} is no name of a key")
    return settings_folder() / "keys" / name


def trusted() -> list[Key]:
    """The keys whose exports the user trusts. Raises RegistryError for a file that somebody else may have written."""
    try:
        file = trusted_place()
    except RegistryError:  # without a home nobody is trusted
        return []
    return [key for line in _trusted_lines(file) if (key := _key(line)) is not None]


def trusted_place() -> Path:
    return settings_folder() / "trusted_keys"


def trust(key: Key) -> bool:
    """Adds a key to those that are trusted; False where it is there, whatever it is called."""
    if any(each.text == key.text for each in trusted()):
        return False
    file = trusted_place()
    _write(file, [*_trusted_lines(file), key.line])
    return True


def forget(which: str) -> list[Key]:
    """Takes the keys of this name, fingerprint or text out of those that are trusted, and returns them."""
    file = trusted_place()
    lines, gone = _trusted_lines(file), []
    for line in lines:
        key = _key(line)
        if key is not None and which and which in (key.name, key.fingerprint, key.text):
            gone.append(key)
    if gone:
        _write(file, [line for line in lines if _key(line) not in gone])
    return gone


def read_key(source: str) -> Key:
    """A public key: as text, in a file, or of who signed an export. Raises UsageError, OSError."""
    from tilebook.registry.lines import signature_of

    try:
        if source.startswith(f"{_KIND} "):
            return Key.of(source)
        try:
            text = _text(Path(source))
        except OSError as error:
            raise UsageError(f"{source} is no key, and no file that can be read: {error.strerror or error}") from error
        signature = signature_of(text)
        return Key.of(text.strip()) if signature is None else signature.key
    except ValueError as wrong:
        raise UsageError(str(wrong)) from wrong


def name_of(source: str) -> str:
    """What a key is called after the file that it is read from; "" where it is given as text."""
    name = "" if source.startswith(f"{_KIND} ") else Path(source).name.partition(".")[0]
    return name if _is_name(name) else ""


def _trusted_lines(file: Path) -> list[str]:
    try:
        found = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would keep it waiting
    except FileNotFoundError:
        return []
    with open(found, "rb") as stream:
        status = os.fstat(found)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST:
            raise RegistryError(f"{file} is no file of at most {_MOST >> 10} KiB, so that no key in it is trusted")
        _refuse_others(file, status, file)
        for folder in {file.parent, Path(os.path.realpath(file)).parent}:
            _refuse_others(folder, folder.stat(), file)
        return _decoded(stream.read(_MOST)).splitlines()


def _refuse_others(place: Path, status: os.stat_result, file: Path) -> None:
    """Raises RegistryError where others can write a place, and so what is trusted."""
    if not hasattr(os, "geteuid"):
        return
    if status.st_uid not in (0, os.geteuid()):
        raise RegistryError(f"{place} is somebody else's, so that no key in {file} is trusted: chown it")
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others and not (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
        raise RegistryError(
            f"{place} can be written by others, so that no key in {file} is trusted: chmod go-w {place}"
        )


def _key(line: str) -> Key | None:
    """None for a comment, and for what is no key."""
    try:
        return Key.of(line)
    except ValueError:
        return None


def _write(file: Path, lines: list[str]) -> None:
    file = Path(os.path.realpath(file))  # a link stays one
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with (
            _named(file),
            open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream,
        ):
            stream.writelines(f"{line}\n" for line in lines)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Has errors of writing, which do not say where that was, name the file. Raises RegistryError."""
    try:
        yield
    except OSError as error:
        raise RegistryError(f"{file} cannot be written: {error.strerror or error}") from error


def _text(file: Path) -> str:
    with file.open("rb") as stream:
        return _decoded(stream.read(_MOST))


def _decoded(content: bytes) -> str:
    return content.decode("utf-8-sig", "replace")


def _is_name(name: str) -> bool:
    try:
        return bool(checks.name(name, "name")) and not name.endswith(".pub")
    except ValueError:
        return False


def _private(place: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    text = _text(place).encode()
    load: Any = load_ssh_private_key if b"OPENSSH" in text[:64] else load_pem_private_key
    try:
        found = load(text, None)
    except TypeError:
        raise UsageError(f"{place} has a passphrase: exports are signed with a key that has none") from None
    except (ValueError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, Ed25519PrivateKey):
        raise UsageError(f"{place} is no private key of Ed25519: `tilebook keys make` makes one")
    return found


def _public(private: Ed25519PrivateKey, name: str) -> Key:
    return Key(base64.b64encode(_BEGIN + private.public_key().public_bytes_raw()).decode(), name)
