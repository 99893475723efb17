"""The scripts in ``examples``, as far as the README does not run them: held_out.py, and the job of SLURM."""

import os
import runpy
import subprocess

import pytest
from PIL import Image
from support.files import contents
from support.pages import ROOT, script
from support.refusal import refused
from torch.distributed.run import get_args_parser

SCRIPT, JOB = ROOT / "examples" / "held_out.py", ROOT / "examples" / "slurm" / "train.sh"
held_out = script(SCRIPT)


def test_held_out_writes_every_picture_or_none(trained, tmp_path):
    for index in (100_000, -1):
        refused(lambda index=index: held_out.main("digits@test", trained, tmp_path, [0, index]), f"no image {index} in")
    assert list(tmp_path.iterdir()) == []
    held_out.main("digits@test", trained, tmp_path, [2, 1, 2])
    first, second = sorted(tmp_path.iterdir())
    assert [path.name.split("-")[0] for path in (first, second)] == ["00001", "00002"]
    with Image.open(second) as picture:
        assert (picture.size, picture.mode) == ((8, 8), "L")
    first.write_text("mine")
    before = contents(tmp_path)
    refused(lambda: held_out.main("digits@test", trained, tmp_path, [0, 1]), f"{first} exists already")
    assert contents(tmp_path) == before


def test_held_out_without_numbers_is_refused(monkeypatch, capsys):
    for words in ([], ["digits", "run", "out"], ["digits", "run", "out", "x"], ["digits", "run", "out", "-1"]):
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *words])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(str(SCRIPT), run_name="__main__")
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("held_out: error: give a SOURCE")
        assert "the numbers of images" in line


SRUN = """#!/bin/sh
echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $*" > "$SAID/srun"
if [ -n "$PROGRESS" ]; then sleep 0.1; mkdir -p "$PROGRESS"; fi  # clocks of disks tick every few ms
exit "$CODE"
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo host0; echo host1; else echo "$*" >> "$SAID/scontrol"; fi
"""


@pytest.mark.parametrize(
    ("code", "progress", "queued"), [(0, True, False), (143, True, True), (1, False, False)],
    ids=["finished", "stopped after a checkpoint", "never came so far"],
)  # fmt: skip
def test_job_queues_itself_again_after_progress(tmp_path, code, progress, queued):
    run = tmp_path / "shared" / "run"
    (run / "checkpoints" / "step-00000005").mkdir(parents=True)  # of a job before
    os.utime(run / "checkpoints" / "step-00000005", (0, 0))
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SAID": str(tmp_path), "CODE": str(code),
        "PROGRESS": str(run / "checkpoints" / "step-00000010") if progress else "",
        "SLURM_JOB_NODELIST": "host[0-1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    words = ["bash", str(JOB), "tiny", str(run), "--steps", "10"]
    assert subprocess.run(words, env=variables, check=False).returncode == code
    started = (tmp_path / "srun").read_text()
    assert started.startswith("300 --kill-on-bad-exit=1 torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 ")
    assert "--rdzv-endpoint host0:29500 --rdzv-id 7 " in started
    assert started.endswith(f"-m pra train tiny --run-dir {run} --steps 10\n")
    assert get_args_parser().parse_args(started.split()[3:]).training_script_args[0] == "train"
    queue = tmp_path / "scontrol"
    assert (queue.read_text() if queue.exists() else "") == ("requeue 7\n" if queued else "")
    assert [path.name for path in run.parent.iterdir()] == ["run"]  # the mark is gone
