"""What a job's script asks before and after ``srun``: python -m lingen.cluster.settle begin|end RUN STAGE ...

The exit code is the answer. 0: go on. 75: queue the job again. 3: the chain stops, and STAGE.json says why. Slurm may
run the script again at any time (preemption, a lost node), also where the last attempt never came to its ``end``.
"""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path

from lingen.cluster.record import (
    StageRecord,
    chain_folder,
    last_record,
    newest_step,
    read_stage,
    write_stage,
)
from lingen.errors import EXIT_BAD_INPUT, UserError, run_main

GO_ON, QUEUE_AGAIN, STOP = 0, 75, 3  # not 1, which is srun's where it could not ask


def begin(run: Path, stage: str, job: int, *, nodes: str, restarts: int, max_preemptions: int) -> int:
    """Open an attempt. One before it that never came to its end was ended by Slurm, which counts as a preemption."""
    record = read_stage(run, stage, job) or StageRecord(stage, job, step=newest_step(run))
    record.requeues = restarts
    step = newest_step(run)
    if restarts and record.state in ("running", "cancelled"):
        _count(record, step, failed=False)
        if record.preemptions >= max_preemptions:
            return _stop(run, record, f"{record.preemptions} preemptions in a row without a new checkpoint")
    reason_file(run, stage).unlink(missing_ok=True)
    record.state, record.reason, record.step, record.nodes, record.began = "running", None, step, nodes, _now()
    write_stage(run, record)
    return GO_ON


def end(run: Path, stage: str, job: int, *, code: int, job_state: str, max_failures: int, max_preemptions: int) -> int:
    """Close the attempt that ``srun`` left with ``code``.

    A reason that a rank wrote down wins over the code: where ranks end one another, ``srun`` tells any of their codes.

    Args:
        job_state: Slurm's state and reason of the job: "RUNNING None". Where Slurm itself is ending the job it is
            COMPLETING, and only one at its time limit is queued again by us: a cancelled one is not to be, and a
            preempted one will be anyway.
    """
    record = read_stage(run, stage, job) or StageRecord(stage, job)
    record.code = code
    trained = last_record(run, stage)
    record.loss = trained["loss"] if trained else record.loss
    step, log = newest_step(run), chain_folder(run) / f"{stage}.log"
    if code == 0:
        return _close(run, record, "finished", step)
    state, _, why = job_state.partition(" ")
    if state not in ("", "RUNNING") and why != "TimeLimit":
        return _close(run, record, "cancelled", step)
    try:
        return _stop(run, record, reason_file(run, stage).read_text().strip(), step)
    except FileNotFoundError:
        pass
    if code == EXIT_BAD_INPUT:
        return _stop(run, record, f"exit code {code}; see {log}", step)
    _count(record, step, failed=code != QUEUE_AGAIN)
    if record.failures >= max_failures:
        attempts = "an attempt" if max_failures == 1 else f"{record.failures} attempts"
        return _stop(run, record, f"{attempts} without progress, the last with exit code {code}; see {log}", step)
    if record.preemptions >= max_preemptions:
        return _stop(run, record, f"{record.preemptions} preemptions in a row without a new checkpoint", step)
    return _close(run, record, "requeued", step)


def reason_file(run: Path, stage: str) -> Path:
    """Where a rank writes down why it cannot go on."""
    return chain_folder(run) / f"{stage}.reason"


def _count(record: StageRecord, step: int, *, failed: bool) -> None:
    """A new checkpoint since the attempt began is progress, and whatever ended the attempt is forgiven."""
    if step > record.step:
        record.failures = record.preemptions = 0
    elif failed:
        record.failures += 1
    else:
        record.preemptions += 1


def _stop(run: Path, record: StageRecord, reason: str, step: int | None = None) -> int:
    record.reason = reason
    return _close(run, record, "stopped", record.step if step is None else step)


def _close(run: Path, record: StageRecord, state: str, step: int) -> int:
    record.state, record.step, record.ended = state, step, _now()
    write_stage(run, record)
    print(f"{record.ended} {record.stage}: {state}" + (f": {record.reason}" if record.reason else ""), flush=True)
    return {"finished": GO_ON, "requeued": QUEUE_AGAIN}.get(state, STOP)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def main() -> int:
    parser = argparse.ArgumentParser(prog="lingen.cluster.settle")
    parser.add_argument("event", choices=("begin", "end"))
    parser.add_argument("run", type=Path)
    parser.add_argument("stage")
    parser.add_argument("--max-failures", type=int, required=True)
    parser.add_argument("--max-preemptions", type=int, required=True)
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--job-state", default="")
    args = parser.parse_args()
    try:
        job = int(os.environ["SLURM_JOB_ID"])
    except KeyError as error:
        raise UserError("SLURM_JOB_ID is not set; only a job's script calls this") from error
    if args.event == "begin":
        return begin(
            args.run,
            args.stage,
            job,
            nodes=os.environ.get("SLURM_JOB_NODELIST", ""),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            max_preemptions=args.max_preemptions,
        )
    return end(
        args.run,
        args.stage,
        job,
        code=args.code,
        job_state=args.job_state,
        max_failures=args.max_failures,
        max_preemptions=args.max_preemptions,
    )


if __name__ == "__main__":
    run_main(main)
