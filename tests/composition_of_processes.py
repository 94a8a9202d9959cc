"""Runs of the composition matrix's cases for several processes, all in one launch.

Run as `python -m tests.composition_of_processes FOLDER` under torchrun; rank i writes {case name: its Run} to FOLDER/i.
"""

import os
import sys
from pathlib import Path

import torch

from tests.composition_cases import CASES
from tests.composition_runs import run


def main(folder: Path) -> None:
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    runs = {case.name: run(case, folder / "out") for case in CASES if case.processes == processes}
    torch.save(runs, folder / str(rank))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
