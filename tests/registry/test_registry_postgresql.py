"""PostgreSQL servers that go away, come back, or never answer."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator

import psycopg
import pytest
from registry_samples import trial, verdict

from tilebook.registry import Registry, RegistryError, backend, postgresql, store
from tilebook.registry.postgresql import demand_answer
from tilebook.registry.target import Unreachable


@pytest.fixture
def deaf() -> Iterator[int]:
    """The port of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_a_server_that_says_nothing_is_waited_for_as_long_as_one_may(deaf: int) -> None:
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"registry here does not answer within 0\.1 s"):
        demand_answer("here", "127.0.0.1", deaf, 0.1)
    assert time.monotonic() - began >= 0.1
    with pytest.raises(Unreachable, match="does not answer") as caught:
        Registry.open(f"postgresql://me:secret@127.0.0.1:{deaf}/x", wait_s=0.1)
    assert "secret" not in str(caught.value)


def test_a_port_where_nobody_listens_is_one_clear_error(deaf: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = int(server.getsockname()[1])
    with pytest.raises(RegistryError, match="cannot be reached"):
        Registry.open(f"postgresql://127.0.0.1:{free}/x", wait_s=0.1)


def test_a_server_answers_on_its_socket(postgres_cluster: str) -> None:
    demand_answer("here", postgres_cluster.partition("host=")[2], None, 5.0)


@pytest.mark.parametrize("host", [None, "a,b"])
def test_what_is_no_single_host_is_left_to_the_driver(host: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGHOST", raising=False)
    demand_answer("here", host, None, 0.1)


def test_a_writer_waits_for_a_server_that_is_restarted(postgres_target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_RETRY_S", 0.0)
    with Registry.open(postgres_target, write=True) as registry:
        down: Iterator[bool] = iter([True, True])
        ask = postgresql.demand_answer

        def asked(*arguments: object) -> None:
            if next(down, False):
                raise Unreachable("the server is starting")
            ask(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(postgresql, "demand_answer", asked)
        registry.record([trial()])
        assert registry.trials() == [trial()]
        assert next(down, None) is None
        monkeypatch.setattr(backend, "WRITER_WAIT_S", 0.0)
        down = itertools.repeat(True)
        with pytest.raises(Unreachable):
            registry.record([trial(1)])


def test_a_connection_that_is_cut_in_mid_write_is_made_again(
    postgres_target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Registry.open(postgres_target, write=True) as registry:
        pour, cut = store.pour, iter([True])

        def poured(session: object, *arguments: object) -> object:
            if next(cut, False):
                _cut_all_others(postgres_target)
            return pour(session, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(store, "pour", poured)
        registry.record([trial()], verdict())
        assert (registry.trials(), registry.verdicts()) == ([trial()], [verdict()])


def _cut_all_others(target: str) -> None:
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    others += " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with psycopg.connect(target, autocommit=True) as connection:
        assert connection.execute(others).fetchall()


def test_a_statement_of_one_who_cannot_wait_is_cut_off(postgres_target: str) -> None:
    Registry.open(postgres_target, write=True).close()
    with (
        Registry.open(postgres_target, wait_s=0.2) as registry,
        pytest.raises(RegistryError, match="statement timeout"),
        registry.asking() as execute,
    ):
        execute("SELECT pg_sleep(20)", ())
