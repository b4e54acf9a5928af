"""Processes of their own, forked so that they start at once: they are killed at any step of their writing, or hold."""

import os
import signal
import sys
import traceback
import warnings

import torch

STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.listdir"}


def forked(work):
    """The id of a process that does this work and ends with 0, or with 1 where it raises."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside other threads: ours only write files
        process = os.fork()
    if process:
        return process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.set_num_threads(1)  # gives up the threads that were not forked along, before others need them
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(process):
    """Its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_at(step, folder, work):
    """Whether SIGKILL hit a process at the n-th thing that it did to files in `folder`; False if it did fewer."""

    def short():
        done = [0]

        def count(event, arguments):
            if event in STEPS and str(folder) in os.fsdecode(arguments[0] if arguments else b""):
                done[0] += 1
                if done[0] > step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()

    code = ended(forked(short))
    assert code in (0, -signal.SIGKILL), "the work itself failed"
    return code != 0
