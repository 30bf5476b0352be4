"""Many small independent computations over CPU processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from types import TracebackType
from typing import Self, TypeVar

import torch

from allometry.data.processes import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """Context with processes that run tasks.

    Every task runs on one thread, in this process (``processes`` 1) or in a spawned one, so that
    results do not depend on the number of processes. Functions, tasks and results must be
    picklable; a script that uses this must guard its main part. Processes start with the first
    task. They end immediately and without output on Ctrl-C, on an exception in this process (such
    as a KeyboardInterrupt), and when this process ends.
    """

    def __init__(self, processes: int = 1) -> None:
        assert processes >= 1, processes
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None
        self._threads = torch.get_num_threads()

    def __enter__(self) -> Self:
        if self.processes == 1:
            torch.set_num_threads(1)
        else:
            self._pool = ProcessPoolExecutor(
                max_workers=self.processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is None:
            torch.set_num_threads(self._threads)
            return
        processes = [*(self._pool._processes or {}).values()]  # has a method from Python 3.14 on
        self._pool.shutdown(wait=error is None, cancel_futures=True)
        if error is not None:
            for process in processes:
                process.kill()

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        done: Callable[[Task, Result], None] | None = None,
    ) -> list[Result]:
        """Return ``function(task)`` for each task, in the order of the tasks.

        ``done`` is called with each result as soon as it is available, in any order. The first
        exception of a task is raised here; tasks that have not started are dropped when the context
        ends. For example, ``Workers(4)`` as a context and ``workers.run(train, trials)``.
        """
        results: dict[int, Result] = {}
        if self._pool is None:
            for index, task in enumerate(tasks):
                results[index] = function(task)
                if done is not None:
                    done(task, results[index])
            return [*results.values()]
        # Processes start here with Ctrl-C blocked until they can handle it without a traceback.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = {self._pool.submit(function, task): i for i, task in enumerate(tasks)}
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for future in as_completed(futures):
            index = futures[future]
            results[index] = future.result()
            if done is not None:
                done(tasks[index], results[index])
        return [results[index] for index in range(len(tasks))]


def _start() -> None:
    end_with_parent()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
