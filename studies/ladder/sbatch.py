"""Scripts for Slurm: one for each remaining run, and one that submits them in order."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from allometry.configs.errors import UserError
from allometry.configs.ladder import SbatchLaunch
from allometry.studies.ladder.run import Say, write_config
from allometry.studies.ladder.share import Plan, PlannedRun
from allometry.studies.ladder.state import COMMANDS, as_stored, state_of

SUBMIT = "submit.sh"
REQUEUES = 20
"""Maximum number of requeues of a job after crashes; Slurm's count includes other requeues."""
RESTARTS = 3
"""Maximum number of restarts of the ranks within a job."""


def write_scripts(plan: Plan, wanted: Sequence[PlannedRun]) -> list[Path]:
    """Write ``scripts/NAME.sbatch`` for each run that is not done, and ``scripts/submit.sh``.

    A branch waits until its parent has finished. Scripts of runs that are done are removed. Returns
    the submit script first, [] if no run remains. Raises UserError: a folder has another run than
    the planned one.
    """
    launch = plan.launch
    assert isinstance(launch, SbatchLaunch), launch
    missing = [run for run in wanted if state_of(run).stage != "done"]
    names = {run.name for run in missing}
    runs = [as_stored(run, plan, names)[0] for run in missing]
    folder = plan.folder / "scripts"
    folder.mkdir(parents=True, exist_ok=True)
    (plan.folder / "logs").mkdir(exist_ok=True)
    for old in [*folder.glob("*.sbatch"), folder / SUBMIT]:
        old.unlink(missing_ok=True)
    if not runs:
        return []
    written = []
    for run in runs:
        path = folder / f"{run.name}.sbatch"
        path.write_text(script(launch, plan, run, write_config(plan, run)), encoding="utf-8")
        written.append(path)
    submit = folder / SUBMIT
    submit.write_text(submission(folder, runs), encoding="utf-8")
    submit.chmod(0o755)
    return [submit, *written]


def offer_scripts(
    plan: Plan, wanted: Sequence[PlannedRun], parallel: int | None, say: Say
) -> list[Path]:
    """Write the scripts and print how to submit them; return their paths, submit.sh first.

    Raises UserError: see ``write_scripts``; or ``parallel`` is given, which Slurm decides.
    """
    if parallel is not None:
        raise UserError(
            "--parallel goes with launch.kind=local; with sbatch, Slurm runs what it has room for"
        )
    written = write_scripts(plan, wanted)
    submit = f"{len(written) - 1} scripts written; submit them with {written[0]}" if written else ""
    say(submit or "nothing is missing")
    return written


def script(launch: SbatchLaunch, plan: Plan, run: PlannedRun, config: Path) -> str:
    """Return the script of one run.

    Slurm's SIGUSR1, two minutes before the end of the job's time, saves and stops the run, like any
    stop signal (docs/resume.md). The job is then requeued, so that dependent jobs wait until the
    run has finished. The job is also requeued after a crash that restarts within the job did not
    fix, but not after a UserError.
    """
    log = plan.folder.resolve() / "logs" / f"{run.name}.log"
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={run.name}",
        f"#SBATCH --output={log}",
        "#SBATCH --open-mode=append",
        f"#SBATCH --nodes={launch.nodes}",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --requeue",
        *(f"#SBATCH {option}" for option in launch.options),
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        *([launch.setup.rstrip()] if launch.setup.strip() else []),
        *_training(launch, config),
        f"events={shlex.quote(str(run.folder.resolve() / 'events.jsonl'))}",
        *ENDING,
    ]
    return "\n".join(lines) + "\n"


ENDING = (
    'if [ "$code" = 0 ]; then',
    '    if tail -n 1 "$events" | grep -q \'"event": "stopped"\'; then',
    '        scontrol requeue "$SLURM_JOB_ID"',
    "    fi",
    f'elif [ "$code" != 2 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {REQUEUES} ]; then',
    '    scontrol requeue "$SLURM_JOB_ID"',
    "fi",
    'exit "$code"',
)
"""Last lines of a script: ``code`` is the launcher's exit code, ``events`` the run's file."""


def _training(launch: SbatchLaunch, config: Path) -> list[str]:
    """Return the training commands: one process, or torchrun on each node, on one endpoint."""
    python, train = (
        shlex.quote(sys.executable),
        f"-m allometry.launch.train {shlex.quote(str(config))}",
    )
    if launch.processes == 1:
        return ["code=0", f"srun {python} {train} || code=$?"]
    return [
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "port=$((20000 + SLURM_JOB_ID % 20000))",
        "code=0",
        f"srun {python} -m allometry.launch.torchrun --nnodes {launch.nodes} "
        f"--nproc-per-node {launch.processes // launch.nodes} --max-restarts {RESTARTS} "
        '--rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:$port" '
        f"{train} || code=$?",
    ]


def submission(folder: Path, runs: Sequence[PlannedRun]) -> str:
    """Return the script that submits ``runs``, branches after their parents."""
    numbers = {run.name: number for number, run in enumerate(runs)}
    of = runs[0].of
    lines = [
        "#!/bin/bash",
        f"# Submits what the {of} lacks; what is missing later, {COMMANDS[of]} writes anew.",
        "set -euo pipefail",
        f"cd {shlex.quote(str(folder.resolve()))}",
    ]
    for number, run in enumerate(runs):
        after = ""
        if run.config.run.parent is not None and run.parent in numbers:
            after = f' --dependency="afterok:$job_{numbers[run.parent]}" --kill-on-invalid-dep=yes'
        file = shlex.quote(f"{run.name}.sbatch")
        lines.append(f"job_{number}=$(sbatch --parsable{after} {file} | cut -d';' -f1)")
        lines.append(f'echo "{run.name}: job $job_{number}"')
    return "\n".join(lines) + "\n"
