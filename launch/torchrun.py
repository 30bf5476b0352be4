"""``python -m allometry.launch.torchrun``: torchrun, for ranks that save when a signal asks.

Its arguments are torchrun's::

    python -m allometry.launch.torchrun --nproc-per-node 8 -m allometry.launch.train CONFIG

torchrun itself takes SIGTERM, SIGINT and SIGHUP as its own end: it gives its ranks 30 seconds, and
ends with a traceback and code 1 although they have saved. Here a signal goes to the ranks alone,
which take the time that they need, and torchrun ends as they do: with code 0 if all have, and with
2 after the sentence of a UserError.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress

import psutil

from allometry.trainer.stop import STOP_SIGNALS

USER_ERROR = 2
"""Exit code of a rank that has said what is wrong."""


def main(arguments: list[str]) -> None:
    """Run torchrun with signals blocked in all its threads but one, which passes them on.

    Ranks inherit the block, so that none is lost or deadly before they watch for them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_pass_on, name="signals", daemon=True).start()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode != USER_ERROR:
            raise
        sys.exit(USER_ERROR)


def _pass_on() -> None:
    passed_on = False
    while True:
        number = signal.sigwait(STOP_SIGNALS)
        ranks = psutil.Process().children()
        if not (ranks or passed_on):  # not started yet
            os._exit(128 + number)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):  # it has ended since
                rank.send_signal(number)
            passed_on = True


if __name__ == "__main__":
    main(sys.argv[1:])
