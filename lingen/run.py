"""What stays the same over all stages of a run, and how the state of a stage is saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lingen.begin import StageState, Start
from lingen.config import RunConfig, StageConfig
from lingen.dist import Dist, StopSignal
from lingen.export import export_finished
from lingen.metrics import Metrics
from lingen.runfolder import architecture, dump_config, run_folder, stage_folder, with_earlier_stages, write_aside
from lingen.saver import Saver
from lingen.task import Inputs, Task
from lingen.watchdog import Watchdog


@dataclass(frozen=True)
class Run:
    """What all stages share."""

    config: RunConfig
    task: Task
    dist: Dist
    inputs: Inputs
    metrics: Metrics
    saver: Saver
    stop: StopSignal
    watchdog: Watchdog

    def asked_to_stop(self, doing: str) -> bool:
        """Whether a signal came to this rank; asking is a sign of life."""
        self.watchdog.beat(doing)
        return self.stop.asked


def open_records(
    config: RunConfig, task: Task, inputs: Inputs, stages: list[StageConfig], start: Start, dist: Dist
) -> Metrics:
    """Write the run's configuration down and open its records."""
    if dist.rank == 0:
        write_aside(run_folder(config) / "config.yaml", dump_config(with_earlier_stages(config)))
        print_choices(config, task, inputs, dist)
    return Metrics(
        run_folder(config),
        config.logger,
        run_name=config.name,
        run_config=config.model_dump(mode="json"),
        rank=dist.rank,
        resume_step=start.progress.step,
        anew=None if start.resume else stages[0].name,
        total_samples=start.progress.samples - start.progress.stage_samples + sum(stage.samples for stage in stages),
    )


def print_choices(config: RunConfig, task: Task, inputs: Inputs, dist: Dist) -> None:
    """What was chosen for this machine, said once."""
    engine = f"DeepSpeed ZeRO-{config.engine.zero_stage}" if config.engine.kind == "deepspeed" else "torch"
    together = f", {dist.sequence} a sample" if dist.sequence > 1 else ""
    print(
        f"{run_folder(config)}: {task.name}, {engine} in {config.engine.dtype}, "
        f"{dist.world} x {dist.device.type}{together}; {inputs.choices(dist.device)}",
        flush=True,
    )


def save(run: Run, stage: StageConfig, state: StageState) -> None:
    """Begin a checkpoint, which is written while training goes on (or at once: ``checkpoint.asynchronous=false``)."""
    start_save(run, stage, state, final=False)
    if not run.config.checkpoint.asynchronous:
        finish_save(run)


def save_final(run: Run, stage: StageConfig, state: StageState) -> Path:
    """Write the stage's last checkpoint, and export its weight average."""
    start_save(run, stage, state, final=True)
    folder = finish_save(run)
    assert folder is not None
    run.watchdog.beat(f"exporting {stage.name}")
    export_finished(run.config, run.dist, run.inputs.export)
    return folder


def finish_save(run: Run) -> Path | None:
    """Wait for the checkpoint that is being written, if any."""
    return run.saver.finish(lambda: run.watchdog.beat("waiting for a checkpoint to be written"))


def start_save(run: Run, stage: StageConfig, state: StageState, *, final: bool) -> None:
    """Take the snapshot. Collective."""
    policy, progress = run.config.checkpoint, state.progress
    number, apart = divmod(progress.stage_step, policy.every_steps)
    finish_save(run)  # an earlier one, with signs of life
    run.metrics.sync()
    run.saver.start(
        stage_folder(run.config, stage.name),
        step=progress.step,
        samples=progress.samples,
        tokens=progress.tokens,
        progress={
            "progress": progress.as_dict(),
            "position": state.loader.position.as_dict(),
            "fps": stage.fps,
            "buckets": list(map(str, stage.buckets)),
            "lineage": state.lineage,
            "read": state.read,
            "bad": state.bad,
            "guard": state.guard.state(),
            **run.inputs.fingerprints(),
        },
        architecture=architecture(run.config),
        final=final,
        regular=not apart,
        kept=not apart and policy.keep_every > 0 and number % policy.keep_every == 0,
        keep_last=policy.keep_last,
        engine=state.networks.engine,
        ema=state.ema,
    )
