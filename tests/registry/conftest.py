from __future__ import annotations

import getpass
import glob
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_samples import mine, run  # noqa: F401 (fixtures)

from tilebook.registry import Registry


def _postgres_programs() -> Path | None:
    found = shutil.which("initdb")
    places = [str(Path(found).resolve().parent)] if found else []
    places += sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    for place in places:
        if all((Path(place) / name).exists() for name in ("initdb", "postgres")):
            return Path(place)
    return None


def _unprivileged() -> str:
    """PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return getpass.getuser()
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[str]:
    """The URL, without a database, of a real server on a socket in a temporary directory."""
    programs = _postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server programs (initdb, postgres) on this machine")
    psycopg = pytest.importorskip("psycopg")
    user = _unprivileged()
    run_as: dict[str, Any] = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
    if os.getuid() != 0:
        run_as = {}
    folder = Path(tempfile.mkdtemp(prefix="tb-pg-"))  # a socket's path is limited to 107 bytes, so not tmp_path
    server = None
    try:
        if run_as:
            shutil.chown(folder, user)
        data = folder / "data"
        make = [programs / "initdb", "-D", data, "-A", "trust", "-U", "tilebook", "-E", "UTF8", "--locale=C", "-N"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **run_as)
        settings = ["fsync=off", "shared_buffers=16MB", "listen_addresses=", f"unix_socket_directories={folder}"]
        command = [programs / "postgres", "-D", data, *(part for item in settings for part in ("-c", item))]
        with open(folder / "log", "wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **run_as)
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(f"host={folder} user=tilebook dbname=postgres").close()
                break
            except psycopg.OperationalError:
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail("PostgreSQL did not start: " + (folder / "log").read_text()[-500:])
                time.sleep(0.1)
        yield f"postgresql://tilebook@/{{}}?host={folder}"
    finally:
        if server is not None:
            server.send_signal(signal.SIGQUIT)  # at once: what it holds is thrown away
            server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_target(postgres_cluster: str) -> str:
    import psycopg

    name = f"t{uuid.uuid4().hex[:12]}"
    folder = postgres_cluster.partition("host=")[2]
    with psycopg.connect(f"host={folder} user=tilebook dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgres_cluster.format(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a registry can be created, on each backend."""
    if request.param == "sqlite":
        return str(tmp_path / "new" / "registry.db")
    return str(request.getfixturevalue("postgres_target"))


@pytest.fixture
def registry(target: str) -> Iterator[Registry]:
    with Registry.open(target, write=True) as opened:
        yield opened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A place for a SQLite registry, alone in its directory."""
    folder = tmp_path / "alone"
    folder.mkdir()
    return folder / "registry.db"
