"""Facts about losses under `torch.compile`: the streaming operators need no graph break."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_losses_compile_whole_and_stay_what_they_are():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("compiled_losses.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 10
    assert max(difference for pair in found.values() for difference in pair) < 1e-12
