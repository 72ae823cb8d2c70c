"""The process that rank processes are forked from: ringcomm is loaded, nothing has been started.

``python -m tests.nursery FD`` obeys one line at a time on socket FD: ``fork`` (with the rank's end of
a connection as a descriptor) answers with the pid, ``reap PID`` with the exit status. A rank then
serves ``(function, args)`` messages on its connection. Everything ends when the socket does.
"""

import ctypes
import importlib
import os
import pickle
import signal
import socket
import sys
import traceback
from multiprocessing.connection import Connection

PRELOAD = ("numpy", "ringcomm.bootstrap", "ringcomm.reference", "tests.worlds")
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _portable(error: BaseException) -> BaseException:
    """The error itself if it survives pickling, else one with its text."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def serve(connection: Connection) -> None:
    """Runs functions for the tests until the connection ends."""
    while True:
        try:
            function, args, kwargs = connection.recv()
        except (EOFError, OSError):
            return
        except Exception as error:  # a function that this process cannot import
            connection.send(("error", _portable(error), traceback.format_exc(), None))
            continue
        try:
            answer = ("value", function(*args, **kwargs), "", None)
        except BaseException as error:
            rank = getattr(error, "rank", None)
            answer = ("error", _portable(error), traceback.format_exc(), rank)
        connection.send(answer)


def main() -> None:
    orders = socket.socket(fileno=int(sys.argv[1]))
    _die_with_parent()
    for module in PRELOAD:
        importlib.import_module(module)
    orders.sendall(b"ready\n")
    while True:
        data, fds, _, _ = socket.recv_fds(orders, 64, 1)
        words = data.split()
        if not words:
            break
        if words[0] == b"fork":
            pid = os.fork()
            if pid == 0:
                _die_with_parent()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                orders.close()
                serve(Connection(fds[0]))
                sys.stdout.flush()
                os._exit(0)
            os.close(fds[0])
            orders.sendall(b"%d\n" % pid)
        else:
            _, status = os.waitpid(int(words[1]), 0)
            orders.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
