"""Whatever a child does, the parent gets an answer or an error in time, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tilebook
from tilebook.tuner.process.child import Child, ChildDied, ChildNotStarted, ChildTimedOut

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone(pid: int, within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running(pid)


@pytest.fixture
def child() -> Iterator[Child]:
    with Child("toy_child", name="toy") as made:
        yield made


def echo(child: Child, text: str = "hi") -> int:
    reply = child.request({"do": "echo", "text": text}, 30)
    assert reply["said"] == text
    return int(reply["pid"])


def test_starts_by_the_first_request_and_serves_many_from_one_process(child: Child) -> None:
    assert not child.alive
    first = echo(child)
    assert child.alive
    assert child.pid == first == echo(child, "a\nb ü \u2028") == echo(child, "x" * 1_000_000)
    assert child.respawns == 0


def test_a_closed_child_is_gone_and_starts_again_when_asked(child: Child) -> None:
    first = echo(child)
    child.close()
    assert not running(first)
    assert echo(child) != first


def test_it_lives_in_a_session_of_its_own_so_that_ctrl_c_passes_it_by(child: Child) -> None:
    pid = echo(child)
    assert os.getsid(pid) == pid == os.getpgid(pid) != os.getsid(0)


def test_an_exception_in_the_handler_is_a_reply_and_the_child_lives_on(child: Child) -> None:
    pid = echo(child)
    error = child.request({"do": "raise"}, 30)["error"]
    assert error["type"] == "KeyError"
    assert "no such thing" in error["text"]
    assert "toy_child.py" in error["traceback"]
    assert child.request({"do": "unsendable"}, 30)["error"]["type"] == "TypeError"
    assert echo(child) == pid


@pytest.mark.parametrize(
    ("message", "how"),
    [
        ({"do": "die", "signal": int(signal.SIGKILL)}, "SIGKILL"),
        ({"do": "die", "signal": int(signal.SIGSEGV)}, "SIGSEGV"),
        ({"do": "exit", "code": 7}, "exited with code 7"),
        ({"do": "exit", "code": 7}, "last words"),
        ({"do": "fork and die"}, "exited with code 3"),
        ({"do": "garbage"}, "not json"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["do"],
)
def test_a_death_is_told_with_its_cause_and_the_next_request_gets_a_new_process(
    child: Child, message: dict[str, object], how: str
) -> None:
    pid = echo(child)
    began = time.monotonic()
    with pytest.raises(ChildDied, match=how):
        child.request(message, 30)
    assert time.monotonic() - began < 10
    assert not running(pid)
    assert not child.alive
    assert echo(child) != pid
    assert child.respawns == 1


def test_a_child_killed_while_idle_is_replaced_without_an_error(child: Child) -> None:
    pid = echo(child)
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    assert echo(child) != pid


def test_a_hanging_child_is_killed_in_time_even_if_it_ignores_sigterm(child: Child) -> None:
    pid = echo(child)
    child.request({"do": "ignore SIGTERM"}, 30)
    began = time.monotonic()
    with pytest.raises(ChildTimedOut, match=r"toy did not answer within 0\.5 s"):
        child.request({"do": "sleep", "seconds": 600}, 0.5)
    assert time.monotonic() - began < 5
    assert not running(pid)
    echo(child)


@pytest.mark.parametrize("kind", ["fork", "daemon"])
@pytest.mark.parametrize("end", ["close", "time-out", "death"])
def test_what_the_child_started_goes_with_it(child: Child, end: str, kind: str) -> None:
    grandchild = child.request({"do": kind}, 30)["pid"]
    assert running(grandchild)
    if end == "close":
        child.close()
    elif end == "time-out":
        with pytest.raises(ChildTimedOut):
            child.request({"do": "sleep", "seconds": 600}, 0.2)
    else:
        with pytest.raises(ChildDied):
            child.request({"do": "exit", "code": 1}, 30)
    assert gone(grandchild)


def test_what_is_printed_cannot_corrupt_the_protocol(child: Child) -> None:
    assert child.request({"do": "print"}, 30) == {}
    echo(child)


def test_what_is_printed_before_serving_is_ignored() -> None:
    with Child("toy_child", ["noisy"]) as child:
        echo(child)


def test_a_second_reply_is_never_taken_for_the_next_answer(child: Child) -> None:
    pid = echo(child)
    assert child.request({"do": "two replies", "number": 2}, 30) == {"said": "first"}
    # The true reply to the second request arrives as a stale line: either it is dropped or the child is replaced.
    try:
        assert echo(child) == pid
    except ChildDied:
        assert echo(child) != pid


def test_megabytes_on_stderr_do_not_block_and_the_end_is_kept(child: Child) -> None:
    assert child.request({"do": "flood", "bytes": 8_000_000}, 30) == {}
    with pytest.raises(ChildDied) as died:
        child.request({"do": "exit", "code": 1}, 30)
    assert len(str(died.value)) < 4_000


def test_a_child_that_cannot_start_says_why() -> None:
    with Child("toy_child", ["broken"]) as child, pytest.raises(ChildNotStarted, match="a module is missing"):
        child.request({"do": "echo", "text": ""}, 30)
    with Child("no_such_module") as child, pytest.raises(ChildNotStarted, match="no_such_module"):
        child.request({"do": "echo", "text": ""}, 30)


def test_starting_has_a_limit_of_its_own() -> None:
    slow = Child("toy_child", ["slow"], name="slow", start_timeout_s=1.0)
    with slow as child, pytest.raises(ChildTimedOut, match=r"slow was not ready within 1 s"):
        child.request({"do": "echo", "text": ""}, 600)


def test_variables_are_set_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_REMOVED", "1")
    monkeypatch.setenv("TOY_KEPT", "1")
    monkeypatch.setenv("TILEBOOK", "1")  # it measures PyTorch's functions, which must be PyTorch's
    with Child("toy_child", env={"TOY_REMOVED": None, "TOY_SET": "2"}) as child:
        seen = child.request({"do": "environment"}, 30)
    assert not {"TOY_REMOVED", "TILEBOOK"} & set(seen)
    assert (seen["TOY_KEPT"], seen["TOY_SET"]) == ("1", "2")


def test_kill_from_another_thread_ends_a_request(child: Child) -> None:
    echo(child)
    threading.Timer(0.3, child.kill).start()
    with pytest.raises(ChildDied, match="SIGKILL"):
        child.request({"do": "sleep", "seconds": 600}, 60)


def test_close_from_another_thread_ends_a_request(child: Child) -> None:
    echo(child)
    threading.Timer(0.3, child.close).start()
    with pytest.raises(ChildDied):
        child.request({"do": "sleep", "seconds": 600}, 60)


def test_a_child_outlives_the_thread_that_started_it(child: Child) -> None:
    thread = threading.Thread(target=echo, args=(child,))
    thread.start()
    thread.join()
    time.sleep(0.1)
    assert child.alive
    echo(child)
    assert child.respawns == 0


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_no_child_outlives_a_parent_that_was_killed(busy: bool) -> None:
    program = f"""
        from tilebook.tuner.process.child import Child
        child = Child("toy_child")
        print(child.request({{"do": "echo", "text": ""}}, 30)["pid"], flush=True)
        if {busy}:
            child.request({{"do": "sleep", "seconds": 600}}, 600)
        input()
    """
    paths = os.pathsep.join([str(Path(tilebook.__file__).parents[1]), str(Path(__file__).parent)])
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert running(pid)
        time.sleep(0.3)
        parent.kill()
    assert gone(pid)
