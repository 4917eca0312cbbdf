"""Every benchmark runs to its table on the tiny shape; its own checks say that both sides do the same work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUNS = {
    "bench_rollout.py group": "--shape tiny --group 2 --tokens 100 --repeats 1",
    "bench_rollout.py queue": "--shape tiny --group 2 --prompts 3 --batch_size 2 --repeats 1",
    "bench_inference.py": "--shape tiny --images 2 --tokens 100 --repeats 1",
    "bench_sft.py": "--shape tiny --rows 8 --batch_size 2 --repeats 1",
    "bench_grpo_step.py": "--shape tiny --group 2 --tokens 20 --repeats 1",
    "bench_data.py": "--rows 2000 --repeats 1",
    "bench_memory.py": "--shape tiny --tokens 200 --rows 1",
}


def test_every_benchmark_is_here():
    scripts = {path.name for path in ROOT.glob("benchmarks/bench_*.py")}
    assert scripts == {name.split()[0] for name in RUNS}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs_and_writes_its_ratio(name, tmp_path):
    script, *rest = name.split()
    table = tmp_path / "table.json"
    command = [sys.executable, f"benchmarks/{script}", *rest, *RUNS[name].split(), "--json", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(table.read_text())["ratio"] > 0
