"""The processes of a run: started, brought together, watched, and ended together with one reason.

Whichever process fails first leaves the reason on a board that all can read, the store through which they met. Those
that only notice that it is gone look there and stay silent. Processes that `launch` starts are watched by the one that
started them, on every machine; those of `torchrun` by its agent.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist

from . import comm
from .errors import InputError, one_line

_FAREWELL = (
    1.0  # seconds that processes have to end by themselves, and to print what they have to say
)
_GRACE = 3.0  # seconds between SIGTERM and SIGKILL
_PATIENCE = 3.0  # seconds that a process which lost another waits for the reason
_METHOD = "spawn"  # CUDA does not survive a fork

# Runs of this process so far: teacher and student may train one after the other through the same meeting point.
_runs = 0
_servers: dict[str, Any] = {}


class ProcessFailure(RuntimeError):
    """A process of the run failed; the text is one line with its rank and the reason."""


class InputFailure(InputError):
    """A process of the run met bad input; the text is one line with its rank."""


@dataclass(frozen=True)
class Place:
    """Where a process stands in a run."""

    rank: int
    local_rank: int
    world: int
    local_world: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world} on {socket.gethostname()}"


@dataclass(frozen=True)
class Reason:
    """Why a run ends: `kind` is input, bug, killed or lost; `line` says it."""

    kind: str
    line: str

    def error(self) -> Exception:
        """The exception that tells it."""
        return (InputFailure if self.kind == "input" else ProcessFailure)(self.line)


class Board:
    """One reason per run, written by the first that has one."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def post(self, reason: Reason) -> bool:
        """Leave a reason; False where one is there already."""
        try:
            if self._store.add("failures", 1) != 1:
                return False
            self._store.set("failure", json.dumps([reason.kind, reason.line]))
        except RuntimeError:
            return True  # the store went with its process: nobody else is going to say it
        return True

    def read(self, seconds: float = 0.0) -> Reason | None:
        """The reason, waiting for one at most that long."""
        end = time.monotonic() + seconds
        while True:
            try:
                if self._store.check(["failure"]):
                    return Reason(*json.loads(self._store.get("failure")))
            except RuntimeError:
                return None
            if time.monotonic() >= end:
                return None
            time.sleep(0.05)

    def register(self, rank: int) -> None:
        """Leave this process's host and number."""
        self._store.set(f"process/{rank}", json.dumps([socket.gethostname(), os.getpid()]))

    def missing(self, world: int) -> str | None:
        """A process of this machine that has ended without a word."""
        for rank in range(world):
            try:
                if not self._store.check([f"process/{rank}"]):
                    continue
                host, pid = json.loads(self._store.get(f"process/{rank}"))
            except RuntimeError:
                return None
            if host == socket.gethostname() and _ended(pid):
                return f"rank {rank} of {world} on {host} (process {pid}) ended without a message: was it killed?"
        return None


def _ended(pid: int) -> bool:
    """Whether a process of this machine is gone, or only waits to be counted out."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[:1] == ["Z"]


def take_part(
    main: Callable[[Any], Any],
    cfg: Any,
    place: Place,
    store: Any,
    device: Callable[[], torch.device],
    minutes: float,
    watched: bool = False,
) -> Any:
    """Run `main(cfg)` as one process of a run, from meeting the others to parting from them.

    Args:
        store: shared by the processes of this run alone.
        device: gives this process's device; called here, so that what it finds wrong ends the whole run.
        minutes: how long a message between processes may take.
        watched: whoever started this process sees how it ends.

    Raises:
        InputError, ProcessFailure: with the rank, on the process that failed first.
        SystemExit: on the others.
    """
    board = Board(store)
    try:
        board.register(place.rank)
        _meet(place, store, device(), minutes)
        result = main(cfg)
        comm.synchronize()  # nobody leaves while another can still fail
        dist.destroy_process_group()
        return result
    except Exception as error:
        reason = _reason(error, place, board, minutes, watched)
        if reason is None or not board.post(reason):
            raise SystemExit(2 if isinstance(error, InputError) else 1) from error
        raise reason.error() from error


def _meet(place: Place, store: Any, device: torch.device, minutes: float) -> None:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore("group", store),
            rank=place.rank,
            world_size=place.world,
            timeout=timedelta(minutes=minutes),
        )
    except RuntimeError as error:
        raise ProcessFailure(
            f"{place}: the {place.world} processes did not all meet within dist_timeout={minutes:g} minutes "
            f"({_first_line(error)}); were all machines started, and can they reach each other?"
        ) from error


def _reason(
    error: Exception, place: Place, board: Board, minutes: float, watched: bool
) -> Reason | None:
    """What to tell about an error; None where another process has told, or will tell, the cause of it."""
    if isinstance(error, InputError):
        return Reason("input", f"{place}: {one_line(error)}")
    meeting = isinstance(error, ProcessFailure)
    if not meeting and not comm.lost_contact(error):
        return Reason("bug", f"{place} failed: {type(error).__name__}: {_first_line(error)}")
    gone = None
    if not watched and board.read() is None:
        gone = board.missing(place.world)
    if gone is not None:
        return Reason("killed", gone)
    if board.read(_PATIENCE) is not None:
        return None
    if meeting:
        return Reason("lost", str(error))
    return Reason(
        "lost",
        f"{place} lost contact with another process, or waited longer than dist_timeout={minutes:g} minutes for it "
        f"({_first_line(error)})",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return text if len(text) <= 300 else text[:297] + "..."


def show(error: BaseException) -> None:
    """Print the traceback behind a failure, unless the run's log has shown it already or it is bad input."""
    cause = error.__cause__ if isinstance(error, ProcessFailure) else None
    if cause is None or getattr(cause, "is_logged", False) or comm.lost_contact(cause):
        return
    if not isinstance(cause, ProcessFailure):
        traceback.print_exception(type(cause), cause, cause.__traceback__)


# ------------------------------------------------------------------------------- under torchrun


def under_torchrun(
    main: Callable[[Any], Any], cfg: Any, device: Callable[[], torch.device], minutes: float
) -> Any:
    """Take part in the run that the environment describes."""
    global _runs
    _runs += 1
    env = os.environ
    place = Place(
        int(env["RANK"]), comm.get_local_rank(), int(env["WORLD_SIZE"]), int(env.get("LOCAL_WORLD_SIZE", 1))
    )  # fmt: skip
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=minutes)))
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{place}: no meeting point ({_first_line(error)}); start with torchrun, or set MASTER_ADDR, MASTER_PORT, "
            "RANK and WORLD_SIZE"
        ) from error
    return take_part(main, cfg, place, dist.PrefixStore(f"run{_runs}", store), device, minutes)


# ---------------------------------------------------------------------------- started by `launch`


def start(
    main: Callable[[Any], Any],
    cfg: Any,
    device: Callable[[], torch.device],
    minutes: float,
    local: int,
    machines: int = 1,
    machine_rank: int = 0,
    url: str = "auto",
) -> None:
    """Start this machine's processes and watch them until all have ended.

    Raises:
        InputError, ProcessFailure: the reason of the process that failed first, here or on another machine. All
            processes of this machine have ended by then.
    """
    global _runs
    _runs += 1
    server, host, port = _server(machines, machine_rank, url, minutes)
    name = f"run{_runs}"
    context, method = multiprocessing.get_context(_METHOD), multiprocessing.get_start_method()
    processes = []
    for i in range(local):
        place = Place(machine_rank * local + i, i, machines * local, local)
        arguments = (main, cfg, place, (host, port, name), device, minutes, os.getpid(), method)
        processes.append(context.Process(target=_process, args=arguments, name=str(place)))
    board = Board(dist.PrefixStore(name, server))
    with _ended_politely():
        try:
            for process in processes:
                process.start()
            reason = _watch(processes, board)
            _wait(processes, _FAREWELL)
        except BaseException:
            board.post(Reason("killed", f"the run was ended by hand on {socket.gethostname()}"))
            raise
        finally:
            _end(processes)
    if reason is not None:
        if machines > 1 and machine_rank == 0:
            time.sleep(
                2 * _FAREWELL
            )  # the reason stands in this process; let the other machines read it
        raise reason.error()


def _server(machines: int, machine_rank: int, url: str, minutes: float) -> tuple[Any, str, int]:
    """The store of the run, and the address that its processes find it at."""
    timeout = timedelta(minutes=minutes)
    if machines == 1 and url == "auto":
        server = dist.TCPStore("127.0.0.1", 0, None, True, timeout, wait_for_workers=False)
        return server, "127.0.0.1", server.port
    parsed = urlparse(url)
    try:
        host, port = parsed.hostname, parsed.port
    except ValueError:
        host = port = None
    if parsed.scheme != "tcp" or not host or not port:
        raise InputError(
            f"--dist-url {url}: {machines} machines need one meeting point, tcp://HOST:PORT with the name of machine 0 "
            "and a free port there, the same on all of them"
        )
    if url not in _servers:
        if machine_rank != 0:
            _wait_for(host, port, minutes)
        try:
            _servers[url] = dist.TCPStore(
                host, port, None, machine_rank == 0, timeout, wait_for_workers=False
            )
        except RuntimeError as error:
            raise InputError(
                f"--dist-url {url}: cannot be used ({_first_line(error)}); machine 0 needs a free port of its own there"
            ) from error
    return _servers[url], host, port


def _wait_for(host: str, port: int, minutes: float) -> None:
    """Wait until somebody listens there; in Python, so that Ctrl-C ends it."""
    end = time.monotonic() + 60 * minutes
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise InputError(
                    f"--dist-url tcp://{host}:{port}: machine 0 does not answer within dist_timeout={minutes:g} "
                    f"minutes ({error.strerror or error}); start it, and open the port"
                ) from error
            time.sleep(0.5)


@contextmanager
def _ended_politely() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that the started processes end as well."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _watch(processes: list[Any], board: Board) -> Reason | None:
    """Wait until all processes have ended, or one of the run has failed; the reason then."""
    alive = list(processes)
    while alive:
        connection.wait([process.sentinel for process in alive], timeout=0.5)
        for process in [p for p in alive if p.exitcode is not None]:
            alive.remove(process)
            if process.exitcode != 0:
                return _why(process, board)
        reason = board.read()
        if reason is not None:
            return reason
    return None


def _why(process: Any, board: Board) -> Reason:
    code = process.exitcode
    number = -code if code < 0 else code - 128
    names = {s.value: s.name for s in signal.Signals}
    if code > 0:
        told = board.read(1.0)  # a process that has something to say has said it before it ends
        if told is not None:
            return told
    if number in names:
        text = f"was killed by {names[number]}"
        if number == signal.SIGKILL:
            text += " (by the system, if it ran out of memory)"
    else:
        text = f"ended with exit code {code} and no message"
    own = Reason("killed", f"{process.name} (process {process.pid}) {text}")
    return own if board.post(own) else board.read(_PATIENCE) or own


def _end(processes: list[Any]) -> None:
    """End what still runs: ask, wait a moment, insist."""
    started = [process for process in processes if process.pid is not None]
    for process in started:
        if process.is_alive():
            process.terminate()
    _wait(started, _GRACE)
    for process in started:
        if process.is_alive():
            process.kill()
            process.join()


def _wait(processes: list[Any], seconds: float) -> None:
    """Wait until all have ended, at most that long."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))


def _process(
    main: Callable[[Any], Any],
    cfg: Any,
    place: Place,
    address: tuple[str, int, str],
    device: Callable[[], torch.device],
    minutes: float,
    parent: int,
    method: str,
) -> None:
    """What a started process does."""
    # Spawned processes would spawn theirs too: loading processes that read and import everything again.
    multiprocessing.set_start_method(method, force=True)
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the watching process acts
    host, port, name = address
    os.environ.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(place.local_rank),
        WORLD_SIZE=str(place.world),
        LOCAL_WORLD_SIZE=str(place.local_world),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _cores() // place.local_world))
    store = dist.TCPStore(host, port, None, False, timedelta(minutes=minutes))
    try:
        take_part(main, cfg, place, dist.PrefixStore(name, store), device, minutes, watched=True)
    except InputError:
        sys.exit(2)  # the watching process prints it
    except ProcessFailure as failure:
        show(failure)
        sys.exit(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with(parent: int, worker: int | None = None) -> None:
    """Ask the system to kill this process when the one that started it is gone (Linux only).

    Loading processes of PyTorch look for their parent themselves, but one that was orphaned before it first looked, or
    that waits for somebody to take its data, would stay.

    Args:
        parent: number of the process that started this one.
        worker: not used; what a loader passes to its `worker_init_fn`.
    """
    if sys.platform != "linux":
        return
    # The system means the thread that started this process: one that ends earlier than its process must not count.
    if threading.current_thread().name == "MainThread":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        # It is gone already, or a fork server stands between and outlives it.
        threading.Thread(target=_outlive, args=(parent,), daemon=True).start()


def _outlive(parent: int) -> None:
    while not _ended(parent):
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)
