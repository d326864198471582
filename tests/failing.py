"""Hooks that make one process of a run fail, for `test_distributed.py`; configs name this file in `custom_imports`."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

from pointcept_kd.host import InputError, comm, kd
from pointcept_kd.host.hooks import HookBase


@kd.HOOKS.register_module(force=True)
class FailOn(HookBase):
    """Let one rank fail in the second iteration of an epoch: `how` is input, bug, kill, exit or hang.

    Before, every rank writes its process number and those of its loading processes to `{note}.{rank}`.
    """

    def __init__(self, note, how, rank=1, epoch=0):
        self.note, self.how, self.rank, self.epoch = note, how, rank, epoch

    def after_step(self):
        trainer = self.trainer
        if trainer.comm_info["iter"] == 0:
            pids = [os.getpid(), *(p.pid for p in multiprocessing.active_children())]
            path = Path(f"{self.note}.{comm.get_rank()}")
            part = Path(f"{path}.tmp")
            part.write_text(json.dumps(pids))
            part.replace(path)
            comm.synchronize()
            return
        if comm.get_rank() != self.rank or (trainer.epoch, trainer.comm_info["iter"]) != (
            self.epoch,
            1,
        ):
            return
        if self.how == "input":
            raise InputError("scan 7: the file is cut off; copy it again")
        if self.how == "bug":
            raise ZeroDivisionError("a planted bug")
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "exit":
            os._exit(5)
        time.sleep(600)
