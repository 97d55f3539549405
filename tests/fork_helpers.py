"""Training runs as real processes that start in no time: forked from a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")


def start_server():
    """Begin to start the server, once: before a comparison in this process starts one that has imported less."""
    here = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    CONTEXT.set_forkserver_preload(["fork_preload"])
    with mock.patch.dict(os.environ, PYTHONPATH=here):
        forkserver.ensure_running()


class Run:
    """``lit-sigsoftmax`` with the given words in one or several processes, each on its own log.

    Args:
        words: The command line.
        folder: The working directory.
        processes: The number of ranks, joined by gloo on this machine.
        at: Called in the process of ``rank`` before it begins: what is to happen to it.
        rank: The process to which ``at`` happens.
    """

    count = 0

    def __init__(self, words, folder, processes=1, at=None, rank=0):
        start_server()
        Run.count += 1
        ddp = [f"--trainer.devices={processes}", "--trainer.strategy=ddp"] if processes > 1 else []
        words, port = [*words, *ddp], free_port()
        self.logs = [Path(folder, f"{Run.count}-{i}.log") for i in range(processes)]
        self.children = []
        for i, log in enumerate(self.logs):
            environment = {"OMP_NUM_THREADS": "1", "LOCAL_RANK": i, "NODE_RANK": 0, "WORLD_SIZE": processes}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
            arguments = (list(words), str(folder), str(log), environment, i, at if i == rank else None)
            self.children.append(CONTEXT.Process(target=_run, args=arguments))
            self.children[-1].start()

    def wait(self, timeout=240):
        """The exit codes, minus the signal where one ended a process."""
        for child in self.children:
            child.join(timeout)
        alive = [i for i, child in enumerate(self.children) if child.is_alive()]
        for child in self.children:
            child.kill()
            child.join()
        assert not alive, f"ranks {alive} hang:\n{self.output}"
        return [child.exitcode for child in self.children]

    @property
    def output(self):
        return "\n".join(log.read_text() for log in self.logs if log.exists())


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def _run(words, folder, log, environment, rank, at):
    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(folder)
    sys.path.insert(0, folder)
    if environment["WORLD_SIZE"] == 1:
        environment = {"OMP_NUM_THREADS": "1"}
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # what it was for the test for which the server was started
    os.environ.update({key: str(value) for key, value in environment.items()})
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from lit_sigsoftmax import training

    torch.set_num_threads(1)
    rank_zero_only.rank = rank  # what it would be, had the process imported Lightning itself
    if at is not None:
        at()
    code = 0
    try:
        training.run(words)
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


class AtCall:
    """Something that happens to a process from within, at the n-th call of a Python function after training has begun.

    Args:
        n: The call; 0 to count the calls of a whole training into a file.
        signum: A signal that the process gets.
        inside: Count only the calls within functions of this name.
        error: An exception that is raised instead.
        counted: The file for the count.
    """

    def __init__(self, n, signum=0, inside=None, error=None, counted=None):
        self.n, self.signum, self.inside, self.error, self.counted = n, signum, inside, error, counted

    def __call__(self):
        from lightning.pytorch.loops.fit_loop import _FitLoop

        run = _FitLoop.run

        def counting(loop):
            calls, depth = 0, 0

            def count(frame, event, argument):
                nonlocal calls, depth
                if self.inside == frame.f_code.co_name:
                    depth += {"call": 1, "return": -1}.get(event, 0)
                if event != "call" or (self.inside and not depth):
                    return
                calls += 1
                if calls == self.n:
                    sys.setprofile(None)
                    print("hit in", frame.f_code.co_filename, frame.f_code.co_name, flush=True)
                    if self.error:
                        raise self.error
                    os.kill(os.getpid(), self.signum)

            sys.setprofile(count)
            run(loop)
            sys.setprofile(None)
            if self.counted:
                Path(self.counted).write_text(str(calls))

        _FitLoop.run = counting


class FullDisk:
    """From the n-th checkpoint on, the disk has room for the first few bytes of a file alone."""

    def __init__(self, n):
        self.n = n

    def __call__(self):
        import resource

        from lit_sigsoftmax.checkpoints import CheckpointFiles

        save, written = CheckpointFiles.save_checkpoint, 0

        def limited(*args, **kwargs):
            nonlocal written
            written += 1
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            if written >= self.n:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
            try:
                save(*args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        CheckpointFiles.save_checkpoint = limited
