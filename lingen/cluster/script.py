"""The batch script of a job, from slurm/stage.sbatch. Every word of a command line is quoted in it."""

from __future__ import annotations

import shlex
from pathlib import Path

from jinja2 import Environment, StrictUndefined, TemplateError

from lingen.cluster.config import ClusterConfig, ContainerConfig
from lingen.cluster.record import chain_folder
from lingen.cluster.request import Chain, Job, interpreter, job_name
from lingen.cluster.settle import reason_file
from lingen.compose import CONF_DIR
from lingen.errors import UserError

ROOT = CONF_DIR.parent
TEMPLATE = ROOT / "slurm" / "stage.sbatch"


def render(chain: Chain, job: Job, template: Path = TEMPLATE) -> str:
    """The whole script of ``job``.

    Raises:
        UserError: the template cannot be read, or wants a value that there is not.
    """
    cluster, folder = chain.cluster, chain_folder(chain.run)
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = lambda text: shlex.quote(str(text))
    try:
        return environment.from_string(template.read_text()).render(
            stage=job.stage,
            run=chain.run,
            job_name=job_name(chain, job),
            cluster=cluster,
            nodes=job.nodes,
            time=job.time,
            log=str(folder / f"{job.stage}.log"),
            reason=reason_file(chain.run, job.stage),
            folder=Path.cwd(),
            root=ROOT,
            alone=_alone(chain),
            together=_inside(cluster, chain),
            words=[interpreter(cluster), str(ROOT / "train.py"), *job.words],
        )
    except OSError as error:
        raise UserError(f"{template} cannot be read: {error.strerror}") from error
    except TemplateError as error:
        raise UserError(f"{template}: {error}") from error


def _alone(chain: Chain) -> str:
    """How one Python is started on the job's first node, where training's is not all there is."""
    cluster = chain.cluster
    step = ["srun", "--nodes=1", "--ntasks=1"] if cluster.container and cluster.container.kind == "pyxis" else []
    return " ".join(filter(None, [*step, _inside(cluster, chain), shlex.quote(interpreter(cluster))]))


def _inside(cluster: ClusterConfig, chain: Chain) -> str:
    """What stands before a command that runs in the container; empty without one."""
    container = cluster.container
    if container is None:
        return ""
    mounts = ",".join(_mounts(container, chain))
    if container.kind == "pyxis":
        words = [f"--container-image={container.image}", f"--container-mounts={mounts}"]
        words.append(f"--container-workdir={Path.cwd()}")
    else:
        gpus = ["--nv"] if cluster.gpus_per_node else []
        words = ["apptainer", "exec", *gpus, f"--bind={mounts}", f"--pwd={Path.cwd()}", container.image]
    return " ".join(map(shlex.quote, words))


def _mounts(container: ContainerConfig, chain: Chain) -> list[str]:
    ours = dict.fromkeys([ROOT, Path.cwd(), Path(chain.config.runs_dir).absolute()])
    return [*(f"{path}:{path}" for path in ours), *container.mounts]
