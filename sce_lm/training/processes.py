"""The processes of a run: `accelerate launch --cpu --num_processes N` starts N, and all are known.

On CPUs accelerate leaves the processes to mpirun and, without one, starts a single process and says
nothing of it. Training would go on with a different batch than was asked for. So the one process
puts torchrun, which is what accelerate starts on GPUs, in its own place.
"""

import os
import sys
from pathlib import Path
from typing import Any

from sce_lm.requirements import require
from sce_lm.training import NEEDED

require("sce_lm.training", *NEEDED)

import psutil
from accelerate import Accelerator
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which torchrun and the several kinds of MPI tell a process that it has company."""

LAUNCHERS = ("launch", "accelerate-launch", "accelerate.commands.launch")
"""What stands before the options: `accelerate launch`, or one of two other ways to call it."""


def start_missing_processes() -> None:
    """Replace this process by all that `accelerate launch` was asked for, if it started only one.

    Returns if there is nothing to do. Raises ValueError where several machines were asked for.
    """
    is_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    # accelerate sets an address to meet at only where there is somebody to meet.
    is_alone = "MASTER_ADDR" in os.environ and not any(name in os.environ for name in SIZES)
    parent = psutil.Process().parent()
    command = parent.cmdline() if parent else []
    launchers = [i for i, a in enumerate(command) if Path(a).name in LAUNCHERS]
    if not (is_on_cpu and is_alone and launchers):
        return
    asked = launch_command_parser().parse_args(command[launchers[0] + 1 :])
    machines, processes = asked.num_machines, asked.num_processes
    if processes is None:
        config = load_config_from_file(asked.config_file)
        assert isinstance(config, ClusterConfig)
        machines, processes = config.num_machines, config.num_processes
    if (machines or 1) > 1:
        raise ValueError(
            f"accelerate launch was asked for {machines} machines without GPUs, for which it needs "
            "mpirun; name its hostfile by --mpirun_hostfile, or use torchrun on each machine."
        )
    if processes == 1:
        return
    workers = ["--standalone", "--nproc-per-node", str(processes)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *workers]
    module = sys.modules["__main__"].__spec__  # None: a file was started
    program = ["-m", module.name.removesuffix(".__main__")] if module else sys.argv[:1]
    os.execv(sys.executable, [*torchrun, *program, *sys.argv[1:]])


SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Ways to run in which a process holds parts of the parameters."""


def build_accelerator(**options: Any) -> Accelerator:
    """An Accelerator with these options, checked by :func:`check_processes`."""
    accelerator = Accelerator(**options)
    check_processes(accelerator)
    return accelerator


def check_processes(accelerator: Accelerator) -> None:
    """Raise ValueError if processes that were started together do not know of each other, each of
    which would train alone and write over the others, or if they would share out the parameters,
    which checkpoints and the saved model hold whole."""
    for name in SIZES:
        started = os.environ.get(name, "")
        if started.isdigit() and int(started) > accelerator.num_processes:
            raise ValueError(
                f"{started} processes were started ({name}) and accelerate sees "
                f"{accelerator.num_processes}, so each would do all of the work alone; start them "
                "with an accelerate configuration for that many processes on this kind of device "
                "(on CPUs: no FSDP), or start one."
            )
    if accelerator.distributed_type in SHARDED:
        raise ValueError(
            f"The processes were started under {accelerator.distributed_type.value}, which cuts "
            "the parameters up, and a run holds them whole; start one process, or several with "
            "plain data parallelism (accelerate launch --multi_gpu)."
        )
