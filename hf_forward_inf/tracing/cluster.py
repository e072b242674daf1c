"""A [`ShardedRun`] on datatrove's executors: processes of this machine, SLURM, Ray (`hf-forward-inf[cluster]`)."""

from typing import Any, Literal

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from hf_forward_inf.tracing.shards import ShardedRun

EXECUTORS = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}


class TraceShards(PipelineStep):
    """A step of a datatrove pipeline that traces a rank's files; it reads no documents of earlier steps.

    Args:
        run (`ShardedRun`): The run.
    """

    type = "Forward-INF"
    name = "trace"

    def __init__(self, run: ShardedRun):
        super().__init__()
        self.sharded = run

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Trace every file of this rank, and pass on what came in."""
        for number in range(rank, len(self.sharded.files), world_size):
            with self.track_time("shard"):
                self.stat_update("rows", value=self.sharded.trace(number))
        return data


def executor(
    run: ShardedRun, kind: Literal["local", "slurm", "ray"] = "local", workers: int = 1, **options: Any
) -> Any:
    """Return datatrove's executor of a run, a task for each file; call its `run()`.

    Finished tasks are skipped when it is run again, and a task that was killed goes on after its last saved chunk.

    Args:
        run (`ShardedRun`): After [`ShardedRun.start`].
        kind (`str`, defaults to `"local"`): Processes of this machine, or jobs of SLURM or Ray.
        workers (`int`, defaults to 1): Tasks at once.
        **options: Of the executor: SLURM needs `time` and `partition`; both it and Ray take `gpus_per_task`,
            `cpus_per_task` and `mem_per_cpu_gb`, SLURM `venv_path` and `sbatch_args`, too.
    """
    logs = f"{run.folder}/logs/{kind}"
    return EXECUTORS[kind](
        pipeline=[TraceShards(run)], tasks=len(run.files), workers=workers, logging_dir=logs, **options
    )
