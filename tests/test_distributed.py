"""DistributedDataParallel, FSDP2 and distributed checkpoints, in two processes (gloo)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is not distributed")
def test_two_processes_go_where_one_goes(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(WORKER), str(tmp_path / "checkpoint")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(": as one process") == 2
