"""Real processes, started by `accelerate launch` on the CPU."""

import os
import shlex
import subprocess
import sys

DATA_PARALLEL = "--multi_gpu"  # accelerate's name for a launch by torch.distributed, on CPUs too
SHARDED = "--use_fsdp --fsdp_version 2"


def launch(command: str, processes: int = 2, how: str = DATA_PARALLEL) -> str:
    """What `python COMMAND` prints, run in so many processes (one: without a launcher)."""
    launcher = f"-m accelerate.commands.launch {how} --num_processes {processes} --num_machines 1 "
    launcher += "--mixed_precision no --dynamo_backend no --main_process_port 0"
    done = subprocess.run(
        [sys.executable, *(shlex.split(launcher) if processes > 1 else []), *shlex.split(command)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
