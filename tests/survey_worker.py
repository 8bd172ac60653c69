"""A small study in a process of its own, which may be killed."""

import os
import signal
import sys
import threading
from pathlib import Path

from pyro_sam.study.survey import problems
from pyro_sam.study.survey.records import Records
from pyro_sam.study.survey.sizes import Size
from pyro_sam.study.survey.studying import study

SIZE = Size(trials=4, finalists=2, tuning_seeds=2, seeds=2, num_samples=8, points=2, max_replicas=4)
SOURCE = problems.Source("digits-60", "digits", gradients=20, rows=60, validation=60, hidden=(8,))
METHODS = ["mfvi", "ascended"]


def work(out: Path, methods: list[str] = METHODS) -> list[str]:
    """Do what is left of the study; return what it said."""
    problems.SOURCES["digits-60"] = SOURCE
    said: list[str] = []
    try:
        study(["digits-60"], methods, SIZE, Records(out), None, said.append)
    finally:
        del problems.SOURCES["digits-60"]
    return said


if __name__ == "__main__":
    if len(sys.argv) > 2:
        threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGKILL)).start()
    work(Path(sys.argv[1]), sys.argv[3:] or METHODS)
