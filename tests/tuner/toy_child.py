"""A child that misbehaves on request; run as a module by test_child.py."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

from tilebook.tuner.process.child import Json, serve


def handle(message: Json) -> Json:
    match message["do"]:
        case "echo":
            return {"said": message["text"], "pid": os.getpid()}
        case "environment":
            return dict(os.environ)
        case "sleep":
            time.sleep(message["seconds"])
        case "die":
            os.kill(os.getpid(), message["signal"])
        case "exit":
            print("last words", file=sys.stderr)
            os._exit(message["code"])
        case "raise":
            raise KeyError("no such thing")
        case "unsendable":
            return {"value": object()}  # type: ignore[dict-item]
        case "print":
            print("a library says hello")
            os.write(1, b'[1,{"said":"forged"}]\n')
            subprocess.run(["echo", "from a subprocess"], check=True)
        case "flood":
            sys.stderr.write("x" * message["bytes"])
            sys.stderr.write("the end")
        case "fork":
            pid = os.fork()
            if pid == 0:
                time.sleep(600)
            return {"pid": pid}
        case "daemon":
            reader, writer = os.pipe()
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.write(writer, str(os.getpid()).encode())
                    time.sleep(600)
                os._exit(0)
            return {"pid": int(os.read(reader, 20))}
        case "fork and die":
            if os.fork() == 0:
                time.sleep(600)
            os._exit(3)
        case "ignore SIGTERM":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case "garbage":
            _write_to_protocol(b"\xff not json\n")
            time.sleep(600)
        case "two replies":
            _write_to_protocol(b'[%d,{"said":"first"}]\n' % message["number"])
    return {}


def _write_to_protocol(data: bytes) -> None:
    """Finds the private pipe: the highest descriptor that is open for writing to a pipe other than stdout."""
    for fd in range(20, 2, -1):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:") and os.get_inheritable(fd) is False:
                os.write(fd, data)
                return
        except OSError:
            continue


def main(how: Any) -> None:
    if how == "noisy":
        print("imported something\nthat talks", flush=True)
        os.write(1, b"without a line end")
    if how == "broken":
        raise ImportError("a module is missing")
    if how == "slow":
        time.sleep(600)
    serve(handle)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
