"""A script in a process of its own, or in several that talk to each other (gloo)."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def launch(*arguments, num_processes=2):
    """Run a script, or `-m module`, with this checkout in its path; fail with what it wrote if it fails."""
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def launch_text(script, folder, *arguments):
    """Run the text of a script, written into `folder`, in two processes."""
    path = folder / "script.py"
    path.write_text(script)
    launch(path, *arguments)
