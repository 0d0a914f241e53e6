"""SQLite files as a stranger may have made them: opened with care, their schema read before anything is run of it."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

from tilebook.errors import RegistryError
from tilebook.registry import held
from tilebook.registry.checks import quoted
from tilebook.registry.target import Locked, beside, refuse_journal, sniff

# Checking took 10 ms for a file of 9 MB with 6,000 trials: about 1 ms per MB. A reader must not wait for a huge one.
READER_CHECKS_BYTES = 16 << 20

# Every word that the definitions of our tables and indexes are made of. No word for an expression is among them: what
# SQLite computes when it checks or reads a file (generated columns, CHECK, DEFAULT, indexes on expressions, virtual
# tables) is written by whoever made the file, and may never come to an end.
_WORD = re.compile(
    "create|table|index|unique|on|constraint|primary|key|foreign|references|not|null|integer|bigint|boolean|text"
    "|double|precision|float|varchar|datetime|timestamp"
    "|(?:pk|fk|uq|ix|ck)_[a-z0-9_]+|[a-z0-9_]+_id|tilebook_alembic_version|tilebook_alembic_version_pkc|version_num"
    "|sqlite_stat[0-9]|sqlite_sequence|tbl|idx|stat|neq|nlt|ndlt|sample|nsample|seq"
    "|device|environment|kernel|problem|trial|verdict|position|finalist|miss|revocation"
    "|id|name|arch|sm_count|digest|versions|op|sha256|origin|implementation|config|status|failure|reason|time_ms"
    "|samples_ms|facts|created_at|default_time_ms|speedup|speedup_low|speedup_high|evidence|trusted|calls|last_seen"
    "|scope|triton|served|mode|sources|notes|place|code|predicted_ms|again|is_default|form|spot|made|[0-9]+"
)
_LONGEST_SQL = 10_000  # characters of one definition; the longest of ours has 1,500


def connect(path: Path, mode: str, wait_s: float) -> sqlite3.Connection:
    """A connection that begins transactions by hand. `mode` is "ro", "rw" or "rwc" (may create the file)."""
    if mode != "ro":  # who only reads rolls nothing back
        refuse_journal(path)
    # sqlite3's own begin is deferred, and a deferred read that turns into a write fails at once, whatever the time-out.
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode={mode}", uri=True, timeout=wait_s, isolation_level=None, check_same_thread=False
    )
    try:
        # A text with a flipped bit may not be UTF-8; it must cost its row, not the query.
        connection.text_factory = partial(str, encoding="utf-8", errors="replace")
        for pragma in ("foreign_keys=ON", "trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("PRAGMA query_only=ON" if mode == "ro" else "PRAGMA synchronous=FULL")
    except BaseException:
        connection.close()
        raise
    return connection


def begin(connection: sqlite3.Connection, wait_s: float = 0.0) -> None:
    """Begins to read: what follows is all of one state.

    wait_s: how long to wait here for a lock, on a connection that does not wait itself: a writer's is held for a few
    milliseconds, and SQLite, which looks again ever more rarely, may sleep for ten times that.

    SQLite takes a journal for one that nobody owns where its writer ends between two looks at it, and a reader may not
    roll it back. At the next look it is gone; of one that stays `readable` gives a copy.
    """
    until, unowned = time.monotonic() + wait_s, 0
    while True:
        try:
            _patiently(partial(_begun, connection), until)
            return
        except sqlite3.OperationalError as error:
            unowned += 1
            if unowned > 2 or error.sqlite_errorname not in _UNOWNED:
                raise


def _begun(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN")
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        connection.execute("ROLLBACK")
        raise


def begin_writing(connection: sqlite3.Connection, wait_s: float) -> None:
    """Begins to write as soon as nobody else does. What is left of the wait is for readers to leave, who are brief.

    SQLite's own waiting favours whoever has just come: of four that write without pause one had to wait for 13 seconds.
    """
    until = time.monotonic() + wait_s
    connection.execute("PRAGMA busy_timeout=0")
    _patiently(lambda: connection.execute("BEGIN IMMEDIATE"), until)
    connection.execute(f"PRAGMA busy_timeout={max(20, int(1e3 * (until - time.monotonic())))}")


def _patiently(attempt: Callable[[], object], until: float) -> None:
    """Tries again, every few milliseconds, while another process has the lock; `until`: of the monotonic clock."""
    began = time.monotonic()
    while True:
        try:
            attempt()
            return
        except sqlite3.OperationalError as error:
            now = time.monotonic()
            if error.sqlite_errorname != "SQLITE_BUSY" or now >= until:
                raise
            time.sleep(min(_LEAST_SLEEP_S + (now - began) / 8, _MOST_SLEEP_S, until - now))


_LEAST_SLEEP_S, _MOST_SLEEP_S = 0.0003, 0.003
_UNOWNED = ("SQLITE_READONLY_ROLLBACK", "SQLITE_READONLY_RECOVERY", "SQLITE_CANTOPEN")


@contextmanager
def readable(path: Path) -> Iterator[Path]:
    """The registry's file, or a copy of it where a process died in mid-write.

    Its journal must be rolled back first, which a reader may not do in place.
    """
    header = sniff(path)
    if header is None:
        raise RegistryError(f"there is no registry at {path}")
    if header.wal:
        raise RegistryError(
            f"registry {path} is in WAL mode, which cannot be read without creating files: open it once for writing"
        )
    if not _left_in_mid_write(path):
        yield path
        return
    import tempfile

    with tempfile.TemporaryDirectory(prefix="tilebook-read-") as folder:
        yield _recovered(path, Path(folder))


def identity(path: Path) -> tuple[int, int] | None:
    """What tells the file at a place from another that comes there; None where there is none.

    It is not opened: to close it would give up all locks that this process has on it.
    """
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def same(path: Path, before: tuple[int, int] | None) -> tuple[Path, int, int] | None:
    """The file at a place, by what was there before it was opened; None where another is there now."""
    return None if before is None or identity(path) != before else (path, *before)


def _journal(path: Path) -> Path:
    return beside(path, "-journal")


def in_mid_write(path: Path) -> bool:
    """Is anything beside the file that a writer leaves there while it writes, or where it died?"""
    real = os.path.realpath(path)
    return os.path.lexists(f"{real}-journal") or os.path.lexists(f"{real}-wal")


def _left_in_mid_write(path: Path) -> bool:
    """Is there a journal that no living process owns?"""
    if not _journal(path).exists():
        return False
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=0, isolation_level=None)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.Error as error:
        return error.sqlite_errorname in _UNOWNED
    finally:
        connection.close()
    return False


def _recovered(path: Path, folder: Path) -> Path:
    """A copy of the file and its journal, rolled back; copied again where a writer recovered it meanwhile."""
    import shutil

    copy = folder / path.name
    for _ in range(3):
        before = _state(path)
        with contextlib.suppress(FileNotFoundError):
            if before[1] is not None:
                shutil.copyfile(_journal(path), _journal(copy))
            with copy.open("wb") as file:
                file.writelines(held.parts(path))
            if _state(path) == before:
                break
        _journal(copy).unlink(missing_ok=True)
    else:
        raise Locked(f"registry {path} is being recovered by another process")
    connection = connect(copy, "rw", 0)
    connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    connection.close()
    return copy


def _state(path: Path) -> tuple[object, ...]:
    def of(place: Path) -> tuple[int, int, int] | None:
        try:
            found = place.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    return of(path), of(_journal(path))


def refuse_foreign_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Raises RegistryError where the file has anything but plain tables and indexes. Nothing of the file is run."""
    for kind, name, sql in connection.execute(
        "SELECT type, name, substr(sql, 1, ?) FROM sqlite_master", [_LONGEST_SQL]
    ):
        plain = kind in ("table", "index") and (sql is None or _plain(str(sql)))
        if not plain:
            raise RegistryError(
                f"registry {path} is corrupt: its tables are not those of a tilebook registry ({quoted(name)})"
            )


@lru_cache(256)  # every layer has the same ones
def _plain(sql: str) -> bool:
    words = re.findall(r"[A-Za-z0-9_]+|[^\sA-Za-z0-9_]", sql)
    return len(sql) < _LONGEST_SQL and all(word in '(),"' or _WORD.fullmatch(word.lower()) for word in words)


_TABLES = frozenset({"device", "environment", "kernel", "problem", "trial", "verdict", "miss"})
_SINCE = {"revocation": 2, "finalist": 3, "position": 4}
"""The schema that brought a table, where it was not the first."""


def tables_of(schema: int) -> frozenset[str]:
    """The tables that a registry of this schema has."""
    return _TABLES | {name for name, since in _SINCE.items() if schema >= since}


def tables(connection: sqlite3.Connection) -> frozenset[str]:
    """The names of the file's tables."""
    return frozenset(str(name) for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'"))


def check_version(connection: sqlite3.Connection, path: Path, oldest: int, newest: int) -> int:
    """The schema version. Raises RegistryError unless it is one of those."""
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    refuse_version(found or None, str(path), oldest, newest)
    return found


def refuse_version(found: int | None, label: str, oldest: int, newest: int) -> None:
    """Raises RegistryError unless `oldest` <= `found` <= `newest`."""
    if found is None:
        raise RegistryError(f"{label} is not a tilebook registry")
    if found > newest:
        raise RegistryError(f"registry {label} has schema {found}, newer than {newest}: it needs a newer tilebook")
    if found < oldest:
        raise RegistryError(
            f"registry {label} has schema {found}, older than {oldest}:"
            " opening it for writing (tilebook tune) upgrades it"
        )


def damage(connection: sqlite3.Connection, path: Path, most_bytes: float = READER_CHECKS_BYTES) -> str:
    """What SQLite finds wrong with its own structure, in a few words; "" where all is well or the file is too large.

    Rows can vanish with a damaged page and leave no row behind whose digest would tell.
    """
    if path.stat().st_size > most_bytes:
        return ""
    found = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    return "" if found == "ok" else " ".join(quoted(found.replace("\n", " ")).strip("'\"").split())


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what SQLite and the file system raise into a RegistryError of one line."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise explanation(path, error) from error
    except UnicodeError as error:
        # sqlite3 stumbles over its own message when that quotes a damaged schema.
        raise RegistryError(f"registry {path} is corrupt: it holds text that is not UTF-8") from error


def explanation(path: Path, error: Exception) -> RegistryError:
    """One line for what SQLite or the file system says of a registry's file."""
    if isinstance(error, OSError):
        return RegistryError(f"cannot open registry {path}: {error.strerror or error}" + _where(path, error))
    cause = str(error).strip().partition("\n")[0]
    low = cause.lower()
    if "locked" in low or "busy" in low:
        return Locked(f"registry {path} is locked by another process")
    if "not a database" in low or "malformed" in low or "corrupt" in low or "no such" in low:
        return RegistryError(f"registry {path} is corrupt: {cause}")
    if "readonly" in low or "unable to open" in low:
        return RegistryError(f"cannot open registry {path}: {cause}")
    return RegistryError(f"registry {path} failed: {cause}")


def _where(path: Path, error: OSError) -> str:
    name = error.filename
    return f" ({name})" if isinstance(name, str) and name != str(path) else ""
