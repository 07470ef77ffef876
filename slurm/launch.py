"""Submit a curriculum to Slurm as a chain of jobs: ``python slurm/launch.py name=NAME cluster=NAME key=value ...``."""

from __future__ import annotations

import json
import shlex
import sys

from lingen.cluster.status import cancel, find_runs, print_status, rows_of
from lingen.compose import CONF_DIR, parse
from lingen.errors import UserError, nearest, run_main
from lingen.model_config import Section

USAGE = """usage: python slurm/launch.py name=NAME cluster=CLUSTER [the words of train.py ...]
       python slurm/launch.py status name=NAME [runs_dir=runs] [as_json=true]
       python slurm/launch.py cancel name=NAME [runs_dir=runs]

  models=[lingen,dit]         a chain each, in runs NAME/lingen and NAME/dit
  cluster.KEY=VALUE           any key of lingen/cluster/config.py: cluster.partition=gpu cluster.nodes=4
  cluster.stages.STAGE.KEY=VALUE   of one stage: nodes, time, words=[engine=zero3]
  dry_run=true                print the plan, the chain and the scripts; submit nothing
  until=STAGE                 no stage after it

cluster:"""


class ChainArgs(Section):
    """The words of ``status`` and ``cancel``."""

    name: str
    runs_dir: str = "runs"
    as_json: bool = False


def main() -> int:
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(USAGE, ", ".join(sorted(path.stem for path in (CONF_DIR / "cluster").glob("*.yaml"))))
        return 0
    if words[0] in ("status", "cancel"):
        args = parse(ChainArgs, words[1:])
        runs = find_runs(args.runs_dir, args.name)
        if words[0] == "cancel":
            cancel(runs)
        elif args.as_json:
            print(json.dumps(rows_of(runs), indent=1))
        else:
            print_status(runs)
        return 0
    if words[0].isalpha():
        raise UserError(f"'{words[0]}' is neither key=value nor a command{nearest(words[0], ('status', 'cancel'))}")
    from lingen.cluster.checks import plan_jobs  # takes torch, for the plan
    from lingen.cluster.dry import print_dry_run
    from lingen.cluster.request import read_request
    from lingen.cluster.submit import launch

    request = read_request(words)
    planned = plan_jobs(request.chains)
    if request.dry_run:
        print_dry_run(planned)
    else:
        launch(planned)
        where = [f"name={request.name}", *(word for word in words if word.startswith("runs_dir="))]
        print(f"look at it: python slurm/launch.py status {shlex.join(where)}")
    return 0


if __name__ == "__main__":
    run_main(main)
