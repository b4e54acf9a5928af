"""Several processes at one work on the CPU: started by `accelerate launch`, or forked where that is not tested."""

import os
import shlex
import subprocess
import sys
import tempfile

from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from killing import ended, forked

from headwise import cli

DATA_PARALLEL = "--multi_gpu"  # accelerate's name for a launch by torch.distributed, on CPUs too
SHARDED = "--use_fsdp --fsdp_version 2"


def launch(command: str, processes: int = 2, how: str = DATA_PARALLEL) -> str:
    """What `python COMMAND` prints, run in so many processes (one: without a launcher)."""
    launcher = ["-m", "accelerate.commands.launch", *_options(processes, how)]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *shlex.split(command)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fork(line: str, processes: int = 2, how: str = DATA_PARALLEL) -> str:
    """What `headwise LINE` prints. torch is imported already, and patches of the test hold."""
    told = launch_command_parser().parse_args([*_options(processes, how), "headwise"])
    environment = prepare_multi_gpu_env(told) | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": told.master_port}

    def run(rank, out):
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes))
        sys.argv = ["headwise", *shlex.split(line)]
        with os.fdopen(out, "w") as sys.stdout:
            try:
                cli.main()
            except SystemExit as end:
                if end.code:
                    raise

    with tempfile.TemporaryFile() as out:
        ranks = [forked(lambda rank=rank: run(rank, os.dup(out.fileno()))) for rank in range(processes)]
        assert [ended(rank) for rank in ranks] == [0] * processes
        out.seek(0)
        return out.read().decode()


def _options(processes: int, how: str) -> list[str]:
    said = f"{how} --num_processes {processes} --num_machines 1 --mixed_precision no --dynamo_backend no"
    return shlex.split(f"{said} --main_process_port 0")
