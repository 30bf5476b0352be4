"""``python -m allometry.launch.torchrun``: torchrun, for ranks that save when a signal asks.

Its arguments are torchrun's::

    python -m allometry.launch.torchrun --nproc-per-node 8 -m allometry.launch.train CONFIG

torchrun itself takes SIGTERM, SIGINT and SIGHUP as its own end: it gives its ranks 30 seconds, and
ends with a traceback and code 1 although they have saved. Here a signal goes to the ranks alone,
which take the time that they need, and torchrun ends as they do: with code 0 if all have, and with
2 after the sentence of a UserError, which no ``--max-restarts`` tries again (``agent.py``).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress

import psutil

from allometry.data.processes import end_with_launcher, ended_with_this
from allometry.launch.fork_server import ForkServer
from allometry.trainer.stop import STOP_SIGNALS


def main(arguments: list[str]) -> None:
    """Run torchrun with signals blocked in all its threads but one, which passes them on.

    Ranks inherit the block, so that none is lost or deadly before they watch for them.
    """
    end_with_launcher()
    os.environ.update(ended_with_this())
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    passed_on, server = threading.Event(), ForkServer()
    threading.Thread(target=_pass_on, args=[passed_on, server], name="signals", daemon=True).start()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from allometry.launch.agent import USER_ERROR, launch

    try:
        launch(arguments, passed_on.is_set, server)
    except ChildFailedError as error:
        if all(failure.exitcode != USER_ERROR for failure in error.failures.values()):
            raise
        sys.exit(USER_ERROR)


def _pass_on(passed_on: threading.Event, server: ForkServer) -> None:
    while True:
        number = signal.sigwait(STOP_SIGNALS)
        ranks = [each for each in psutil.Process().children() if each.pid != server.pid]
        if not (ranks or passed_on.is_set()):  # not started yet
            os._exit(128 + number)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):  # it has ended since
                rank.send_signal(number)
            passed_on.set()


if __name__ == "__main__":
    main(sys.argv[1:])
