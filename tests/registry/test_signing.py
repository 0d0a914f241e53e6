"""Signed exports: who signs, who is trusted, what is refused."""

import io
import json
import os
import re
import resource
import sys
from pathlib import Path

import pytest
from command_samples import Run, today, tried
from registry_samples import revocation

from tilebook.errors import RegistryError, UsageError
from tilebook.registry import Registry, export, lines, load, signing

# What `ssh-keygen -l` says of this line.
LINE = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPn1VE57r9XRXavoL4SDhTAa7AW73+VksS3Fin5ExJ1P Ada, at home"
FINGERPRINT = "SHA256:VjUFgs72XgabyBRqoXeBvRolQpxL4myoAq5Cj0QVm9M"


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    return tmp_path / "settings" / "tilebook"


@pytest.fixture
def signed(tmp_path: Path, run: Run) -> Path:
    """A signed export of somebody's verdict, trial and revocation."""
    pytest.importorskip("cryptography")
    with Registry.open(tmp_path / "theirs.db", write=True) as registry:
        registry.merge([tried()], [today()], [revocation(config={})])
    run("keys", "make", "theirs")
    file = tmp_path / "signed.jsonl"
    run("export", file, "--sign", "theirs", "--registry", tmp_path / "theirs.db")
    return file


def served(path: Path) -> list[bool]:
    """Whether what a registry holds is trusted: its verdict, its revocation."""
    with Registry.open(path) as registry:
        return [each.trusted for each in (*registry.verdicts(), *registry.revocations())]


def test_a_key_is_written_and_named_as_openssh_does(tmp_path):
    key = signing.Key.of(LINE)
    assert (key.fingerprint, key.name, key.line) == (FINGERPRINT, "Ada, at home", LINE)
    (tmp_path / "ada.pub").write_text(f"{LINE}\n")
    assert signing.read_key(str(tmp_path / "ada.pub")) == signing.read_key(LINE) == key
    other = LINE.split()[1]
    for wrong in ("", "ssh-rsa AAAA x", f"ssh-ed25519 {other[:-4]}", f"ssh-ed25519 {other}{other}", "ssh-ed25519 ü"):
        with pytest.raises(ValueError, match="not a public key"):
            signing.Key.of(wrong)
    with pytest.raises(UsageError, match="not a public key"):
        signing.read_key(str(Path(__file__)))


def test_trusted_keys_are_one_file_that_people_may_edit(run: Run, settings: Path):
    run("keys", "trust", LINE, "--yes")
    file = settings / "trusted_keys"
    assert file.read_text() == f"{LINE}\n"
    file.write_text(f"# friends\nnot a key\n{LINE}\n")
    assert "already" in run("keys", "trust", LINE, "--yes", "--name", "another").output
    assert run("keys", "show").output == f"trusted  {FINGERPRINT} Ada, at home\n"
    assert "no key that is trusted" in run("keys", "forget", "nobody", status=2).output
    run("keys", "forget", FINGERPRINT)
    assert file.read_text() == "# friends\nnot a key\n"
    assert "keys make" in run("keys", "show").output
    run("keys", "trust", LINE, input="n\n", status=1)
    assert signing.trusted() == []


def test_a_key_that_says_no_name_of_its_own_is_called_after_its_file(run: Run, settings: Path, tmp_path: Path):
    bare = LINE.rpartition(" Ada")[0]
    for text in (bare, f"{bare} mine"):
        (tmp_path / "colleague.pub").write_text(f"{text}\n")
        assert "colleague" in run("keys", "trust", tmp_path / "colleague.pub", "--yes").output
        assert run("keys", "show").output == f"trusted  {FINGERPRINT} colleague\n"
        run("keys", "forget", "colleague")
        assert signing.trusted() == []
    (tmp_path / "colleague.pub").write_text(f"{LINE}\n")
    run("keys", "trust", tmp_path / "colleague.pub", "--yes")
    assert run("keys", "show").output == f"trusted  {FINGERPRINT} Ada, at home\n"
    run("keys", "forget", tmp_path / "colleague.pub")
    assert signing.trusted() == []


def test_a_key_that_is_trusted_already_keeps_its_name_and_that_is_said(run: Run, settings: Path):
    run("keys", "trust", LINE, "--yes")
    told = run("keys", "trust", LINE, "--yes", "--name", "another").output
    assert "Ada, at home" in told.splitlines()[0]
    assert told.splitlines()[1] == "it stays Ada, at home: to call it another, forget it first"


def test_a_file_of_a_key_that_is_not_there_is_named(run: Run, settings: Path):
    told = run("keys", "trust", "missing.pub", "--yes", status=2).output
    assert told == "tilebook: missing.pub is no key, and no file that can be read: No such file or directory\n"


@pytest.mark.parametrize("how", ["file", "folder", "target", "owner", "pipe", "size"])
def test_where_others_can_write_nobody_is_trusted(how: str, run: Run, settings: Path, tmp_path: Path):
    run("keys", "trust", LINE, "--yes")
    file = settings / "trusted_keys"
    if how in ("file", "folder"):
        (file if how == "file" else settings).chmod(0o777)
    elif how == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root gives files away")
        os.chown(file, 12345, -1)
    elif how == "size":
        file.write_text(f"{LINE}\n" + "# more\n" * 10_000)
    else:
        file.unlink()
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o777)
        (tmp_path / "open" / "keys").write_text(f"{LINE}\n")
        os.mkfifo(file) if how == "pipe" else file.symlink_to(tmp_path / "open" / "keys")
    for command in (["show"], ["trust", LINE, "--yes"], ["forget", FINGERPRINT]):
        told = run("keys", *command, status=1).output
        assert re.search("so that no key in .* is trusted", told)
        assert len(told.splitlines()) == 1


def test_a_trusted_file_stays_a_link(run: Run, settings: Path, tmp_path: Path):
    settings.mkdir(parents=True)
    (settings / "trusted_keys").symlink_to(tmp_path / "mine")
    (tmp_path / "mine").write_bytes(b"\xef\xbb\xbf" + LINE.encode() + b"\r\n")
    assert FINGERPRINT in run("keys", "show").output
    run("keys", "forget", FINGERPRINT)
    assert (settings / "trusted_keys").is_symlink()
    assert (tmp_path / "mine").read_text() == ""


def test_what_is_no_name_of_a_key_changes_nothing(run: Run, settings: Path, tmp_path: Path):
    bare = LINE.rpartition(" Ada")[0]
    run("keys", "trust", bare, "--yes")
    run("keys", "forget", "", status=2)
    for wrong in ("a\nb", "x" * 200):
        assert len(run("keys", "trust", LINE, "--yes", "--name", wrong, status=2).output.splitlines()) == 1
    (tmp_path / "two").write_text(f"{bare}\n{LINE}\n")
    assert "not a public key" in run("keys", "trust", tmp_path / "two", "--yes", status=2).output
    assert (settings / "trusted_keys").read_text() == f"{bare}\n"


def test_folders_of_keys_are_ones_own(run: Run, settings: Path):
    pytest.importorskip("cryptography")
    before = os.umask(0)
    try:
        run("keys", "make")
    finally:
        os.umask(before)
    assert [each.stat().st_mode & 0o777 for each in (settings, settings / "keys")] == [0o700, 0o700]


def test_a_key_that_cannot_be_written_leaves_nothing_behind(run: Run, settings: Path):
    pytest.importorskip("cryptography")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as on a disk that is full
    try:
        refused = run("keys", "make", status=1).output, run("keys", "trust", LINE, "--yes", status=1).output
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(re.fullmatch(r"tilebook: \S+ cannot be written: .+\n", each) for each in refused)
    assert [each.name for each in settings.rglob("*") if each.is_file()] == []
    run("keys", "make")


def test_an_import_that_asks_for_no_key_ends_well(run: Run, signed: Path, settings: Path, tmp_path: Path):
    run("keys", "trust", signed, "--yes")
    (settings / "trusted_keys").chmod(0o666)
    told = run("import", signed, "--no-trust", "--registry", tmp_path / "new.db").output
    assert "can be written by others" in told
    run("import", signed, "--registry", tmp_path / "other.db", status=1)


def test_without_a_home_nobody_is_trusted(monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert (signing.trusted(), signing.own()) == ([], [])


def test_what_a_trusted_key_has_signed_is_served(run: Run, signed: Path, tmp_path: Path):
    key = signing.own()[0][1]
    told = run("import", signed, "--registry", tmp_path / "stranger.db").output
    assert f"signed by {key.fingerprint}, which is not trusted here" in told
    assert served(tmp_path / "stranger.db") == [False, False]
    run("keys", "trust", signed, "--yes", "--name", "a friend")
    assert f"signed by a friend ({key.fingerprint}), which is trusted" in run("import", signed).output
    assert served(tmp_path / "data" / "tilebook" / "registry.db") == [True, True]
    run("import", signed, "--no-trust", "--registry", tmp_path / "careful.db")
    assert served(tmp_path / "careful.db") == [False, False]
    run("merge", signed, "-o", tmp_path / "merged.db")
    assert served(tmp_path / "merged.db") == [True, True]
    run("keys", "forget", "a friend")
    run("import", signed, "--registry", tmp_path / "later.db")
    assert served(tmp_path / "later.db") == [False, False]


@pytest.mark.parametrize("change", ["records", "digest", "value", "key", "version"])
def test_a_header_that_is_not_what_was_signed_is_refused_whoever_is_trusted(change, run: Run, signed: Path, tmp_path):
    run("keys", "trust", signed, "--yes")
    run("keys", "make", "other")
    head, _, body = signed.read_text().partition("\n")
    mine, other = (key.text for _, key in sorted(signing.own(), key=lambda each: each[1].name != "theirs"))
    changed = {
        "records": head.replace('"records":3', '"records":2'),
        "digest": head.replace('"sha256":"', '"sha256":"0'),
        "value": head.replace('"value":"', '"value":"AA').replace('=="', '"'),
        "key": head.replace(mine, other),
        "version": head.replace('"version":4', '"version":3'),
    }[change]
    assert changed != head
    signed.write_text(f"{changed}\n{body}")
    for more in ([], ["--trust"]):
        told = run("import", signed, *more, "--registry", tmp_path / "new.db", status=1).output
        assert "signature" in told or "header" in told
        assert len(told.splitlines()) == 1
    with Registry.open(tmp_path / "new.db") as registry:
        assert registry.verdicts() == registry.trials() == registry.revocations() == []


def test_records_that_are_not_what_was_signed_are_refused(run: Run, signed: Path, tmp_path: Path):
    run("keys", "trust", signed, "--yes")
    lines_ = signed.read_text().splitlines(keepends=True)
    signed.write_text("".join([lines_[0], lines_[1], lines_[3], lines_[2]]))
    assert "digest of the records is wrong" in run("import", signed, "--registry", tmp_path / "n.db", status=1).output
    assert served(tmp_path / "n.db") == []


def test_a_signature_changes_the_first_line_alone(signed: Path, tmp_path: Path):
    with Registry.open(tmp_path / "theirs.db") as registry:
        plain = io.StringIO()
        export(registry, plain)
    assert plain.getvalue().partition("\n")[2] == signed.read_text().partition("\n")[2]
    assert '"version":3' in plain.getvalue().partition("\n")[0]


def test_what_a_stranger_said_is_not_signed(run: Run, signed: Path, tmp_path: Path):
    run("import", signed, "--no-trust")
    for more in ([], ["--measured"]):
        told = run("export", tmp_path / "again.jsonl", "--sign", "theirs", *more, status=1).output
        assert "no record of your own registry that fits is trusted here" in told
        assert not (tmp_path / "again.jsonl").exists()
    run("import", signed, "--trust")
    assert "2 records written" in run("export", tmp_path / "again.jsonl", "--sign", "theirs").output
    run("import", tmp_path / "again.jsonl", "--trust", "--registry", tmp_path / "other.db")
    assert served(tmp_path / "other.db") == [True, True]


def test_signing_is_refused_with_what_is_no_key(run: Run, tmp_path: Path):
    pytest.importorskip("cryptography")
    (tmp_path / "other").write_text("hello")
    assert "no private key of Ed25519" in run("export", "-", "--sign", tmp_path / "other", status=2).output
    assert "there is no key nobody" in run("export", "-", "--sign", "nobody", status=2).output
    assert "cannot go with" in run("export", tmp_path / "s.db", "--as", "optuna", "--sign", "once", status=2).output
    run("keys", "make", "once")
    assert "already" in run("keys", "make", "once", status=2).output
    assert "no name of a key" in run("keys", "make", "../once", status=2).output
    if os.name == "posix":
        assert signing.own_place("once").stat().st_mode & 0o077 == 0


def test_without_cryptography_a_signature_is_a_claim(run: Run, signed: Path, tmp_path: Path, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    told = run("import", signed, "--registry", tmp_path / "new.db").output
    assert "it says: to look at that, pip install cryptography" in told
    assert served(tmp_path / "new.db") == [False, False]
    run("keys", "trust", signed, "--yes")
    for arguments in (["import", signed], ["export", "-", "--sign", "theirs"], ["keys", "make", "new"]):
        assert "needs cryptography: pip install cryptography" in run(*arguments, status=1).output
    run("import", signed, "--trust", "--registry", tmp_path / "new.db")
    assert served(tmp_path / "new.db") == [True, True]


def test_a_library_that_asks_for_no_trust_gets_none(signed: Path, tmp_path: Path):
    signing.trust(signing.read_key(str(signed)))
    with Registry.open(tmp_path / "new.db", write=True) as registry, signed.open() as stream:
        assert not load(registry, stream, allowed=None).trusted
    with pytest.raises(RegistryError, match="signature is none of Ed25519"):
        lines.signature_of(signed.read_text().replace('"value":"', '"value":"*'))


@pytest.mark.parametrize(
    "wrong",
    [None, 1, "x", [], {}, {"key": "A", "value": "B"}, {"key": None, "value": None}, {"key": [], "value": {}},
     {"key": LINE.split()[1], "value": ""}, {"key": LINE.split()[1], "value": "A" * 88, "more": 1},
     {"key": LINE.split()[1], "value": "A" * 86 + "=="}, {"key": f"{LINE.split()[1]} \n", "value": "A" * 86 + "=="}],
)  # fmt: skip
def test_a_signature_that_is_none_is_one_line(wrong, run: Run, signed: Path, tmp_path: Path):
    head, _, body = signed.read_text().partition("\n")
    signed.write_text(json.dumps({**json.loads(head), "signature": wrong}) + "\n" + body)
    assert len(run("import", signed, "--trust", status=1).output.splitlines()) == 1
    assert len(run("keys", "trust", signed, "--yes", status=None).output.splitlines()) == 1
