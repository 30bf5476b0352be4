"""torchrun whose ranks save a checkpoint when a signal requests a stop.

Run as ``python -m allometry.launch.torchrun``, with the arguments of torchrun::

    python -m allometry.launch.torchrun --nproc-per-node 8 -m allometry.launch.train CONFIG

torchrun itself treats SIGTERM, SIGINT and SIGHUP as a request to end itself: it gives its ranks 30
seconds, and ends with a traceback and code 1 even if the ranks have saved. Here a signal is sent
only to the ranks, which may take as long as they need, and torchrun exits like its ranks: with code
0 if all ranks have exited with 0, and with 2 after a UserError, which is not restarted whatever
``--max-restarts`` is (``agent.py``).
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
    """Run torchrun with the stop signals blocked in all threads but one.

    This thread forwards the signals to the ranks.

    Ranks inherit the blocked signals, so no signal is lost or kills a rank before it handles
    signals.
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
        if not (ranks or passed_on.is_set()):  # the ranks have not been started yet
            os._exit(128 + number)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):  # the rank has ended in the meantime
                rank.send_signal(number)
            passed_on.set()


if __name__ == "__main__":
    main(sys.argv[1:])
