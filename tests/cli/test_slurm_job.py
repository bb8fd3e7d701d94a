"""The SLURM job file, run with stand-ins for SLURM's commands and for `seqlit`, each a few lines of shell."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
TASKS = 2
# Two tasks, each a process group. As SLURM does, it ends the others where one ends badly, and its own status is the
# highest: that of a killed task, 137, rather than that of the one that had something to say.
SRUN = f"""
while [[ $1 == --* ]]; do shift; done
set -m
tasks=()
for rank in $(seq 0 {TASKS - 1}); do
  SLURM_PROCID=$rank "$@" &
  tasks+=($!)
done
echo "${{tasks[@]}}" >tasks
worst=0
for _ in "${{tasks[@]}}"; do
  status=0
  wait -n || status=$?
  [ "$status" -le "$worst" ] || worst=$status
  [ "$status" -eq 0 ] || for task in "${{tasks[@]}}"; do kill -KILL -- "-$task"; done
done 2>/dev/null
exit "$worst"
"""
SCANCEL = 'echo "scancel $*" >>calls\nfor task in $(cat tasks); do kill -TERM -- "-$task"; done'
SCONTROL = 'echo "scontrol $*" >>calls'
NOTE = '[ "$SLURM_PROCID" -ne 0 ] || echo "seqlit $*" >>calls\n'


class Job:
    """A job in ``folder`` whose `seqlit` is ``body``, a few lines of shell."""

    def __init__(self, folder: Path, body: str) -> None:
        self.folder = folder
        commands = folder / "commands"
        commands.mkdir()
        stubs = {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL, "seqlit": NOTE + body}
        for name, text in stubs.items():
            (commands / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
            (commands / name).chmod(0o755)
        self._environment = {
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_ID": "77",
            "SLURM_NTASKS_PER_NODE": str(TASKS),
            "SLURM_NNODES": "1",
        }

    def start(self, restarts: int) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", PROJECT / "scripts" / "slurm.sbatch", "--config", "toy.yaml"],
            env=self._environment | {"SLURM_RESTART_COUNT": str(restarts)},
            stdout=subprocess.DEVNULL,
        )

    def run(self, restarts: int) -> int:
        return self.start(restarts).wait(60)

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


# As `seqlit` does after an error: the others let the first task speak, and are still there when it has ended.
OTHERS_WAIT = '[ "$SLURM_PROCID" -eq 0 ] || sleep 30\n'
FIT = "seqlit fit --config toy.yaml --trainer.devices 2 --trainer.num_nodes 1"


def test_a_first_fit_resumes_nothing(tmp_path):
    job = Job(tmp_path, "exit 0")
    assert job.run(restarts=0) == 0
    assert job.calls() == [FIT]


@pytest.mark.parametrize("status", [1, 2, 137])
def test_a_resume_that_fails_is_passed_on(tmp_path, status):
    """Finished, not finite, disk full, still being trained (2), a bug (1), out of memory (137)."""
    job = Job(tmp_path, f"{OTHERS_WAIT}exit {status}")
    assert job.run(restarts=1) == 137, "that of the task that was killed for it, as srun has it"
    assert job.calls() == [f"{FIT} --ckpt_path last"], "a failed resume must not begin a new run"


def test_without_a_checkpoint_it_begins_anew(tmp_path):
    job = Job(tmp_path, f'[[ $* == *"--ckpt_path last" ]] || exit 0\n{OTHERS_WAIT}exit 3')
    assert job.run(restarts=1) == 0
    assert job.calls() == [f"{FIT} --ckpt_path last", FIT]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls", "commands", "tasks"], "a note was left"


def test_the_new_fits_status_is_the_jobs(tmp_path):
    job = Job(tmp_path, f'{OTHERS_WAIT}if [[ $* == *"--ckpt_path last" ]]; then exit 3; fi\nexit 2')
    assert job.run(restarts=1) == 137
    assert job.calls() == [f"{FIT} --ckpt_path last", FIT]


def test_a_signal_stops_it_queues_it_again_and_it_resumes(tmp_path):
    trains = 'trap "exit 0" TERM\ntouch "trains-$SLURM_PROCID"\nfor _ in {1..600}; do sleep 0.1; done\nexit 9'
    job = Job(tmp_path, f'[[ $* != *"--ckpt_path last" ]] || exit 0\n{trains}')
    batch = job.start(restarts=0)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("trains-*"))) < TASKS:
        assert time.monotonic() < deadline, "the tasks never began"
        time.sleep(0.02)
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(60) == 0
    assert job.calls() == [FIT, "scancel --signal=TERM 77", "scontrol requeue 77"]
    assert job.run(restarts=1) == 0
    assert job.calls()[3:] == [f"{FIT} --ckpt_path last"], "a run that ends by itself is not queued again"


def test_the_command_tells_nothing_to_resume_from_other_errors(seqlit, toys, tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toys.config("sasrec_cce")))
    resume = ("fit", "--config", path, "--ckpt_path", "last")
    status, _, error = seqlit(*resume)
    assert (status, "exit status 3" in error) == (3, True), error
    assert seqlit("fit", "--config", path)[0] == 0
    status, _, error = seqlit(*resume)
    assert (status, "has finished" in error) == (2, True), error
    status, _, error = seqlit(*resume, "--data.init_args.batch_size", "7")
    assert (status, "differs" in error) == (3, True), error
    (run,) = tmp_path.glob("runs/*/version_0")
    (run / "fit.json").unlink()
    (run / "checkpoints" / "last.ckpt").unlink()
    status, _, error = seqlit(*resume)
    assert (status, "was ended before its first last.ckpt" in error) == (3, True), error
    (run / "checkpoints" / "last.ckpt").write_bytes(b"half")
    status, _, error = seqlit(*resume)
    assert (status, "not a checkpoint" in error) == (2, True), error
