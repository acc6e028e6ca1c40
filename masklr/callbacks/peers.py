"""The processes of one run end together."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist

from masklr.processes import start_of


class Peers(pl.Callback):
    """End every process of a run when one has been killed or stands still, where Lightning started them.

    A process learns at once that another was killed, and that one stands still after the strategy's `timeout`; it then
    fails. One that stands still (stopped, or waiting for a dead disk) can do nothing, whichever rank it has: a small
    process that rank 0 starts watches all those on its machine. It kills one that is stopped (SIGSTOP) while others are
    not, so that all end within the time-out; and when one has ended, after five seconds, whatever is left. `torchrun`
    and `srun --kill-on-bad-exit=1` do the same for the processes that they start.
    """

    def __init__(self) -> None:
        self._watcher: subprocess.Popen[bytes] | None = None

    def watch_from_launch(self, trainer: pl.Trainer) -> None:
        """Watch already while processes look for each other, which is before `setup`."""
        launcher = trainer.strategy.launcher
        if launcher is None:
            return
        launch = launcher.launch

        def watched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def begin(*args: Any, **kwargs: Any) -> Any:  # called when the others have been started
                self._watch(trainer)
                return function(*args, **kwargs)

            return launch(begin, *args, **kwargs)

        launcher.launch = watched  # type: ignore[method-assign]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin to watch."""
        self._watch(trainer)

    def _watch(self, trainer: pl.Trainer) -> None:
        started = getattr(trainer.strategy.launcher, "procs", None)
        if not started or self._watcher is not None:
            return
        starts = {pid: start_of(pid) for pid in (os.getpid(), *(process.pid for process in started))}
        if None not in starts.values():
            limit = getattr(trainer.strategy, "_timeout", None)
            seconds = math.inf if limit is None else limit.total_seconds()
            watched = [f"{pid}:{start}" for pid, start in starts.items()]
            command = [sys.executable, "-m", "masklr.processes", str(seconds), *watched]
            self._watcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nobody waits for another from here on: each process may end when it likes."""
        trainer.strategy.barrier("masklr.callbacks.Peers")
        self._let_end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Processes that end at a signal have agreed on it; otherwise the watcher is needed now."""
        if isinstance(exception, SystemExit):
            self._let_end()

    def _let_end(self) -> None:
        if self._watcher is not None:
            self._watcher.send_signal(signal.SIGUSR1)
            self._watcher = None


def leave_peers() -> None:
    """End the threads of the process group: Python aborts if one of gloo's still holds a tensor when it ends."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_loss_of_a_peer(error: Any) -> bool:
    """Whether an error says that another process has ended or did not answer in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
