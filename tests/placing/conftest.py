"""Lets the tests of this folder share the tiny models of tests/engine and the changes of tests/interventions."""

import sys
from pathlib import Path

import torch

for name in ("engine", "interventions", "placing"):
    sys.path.insert(0, str(Path(__file__).parents[1] / name))
torch.set_num_threads(1)
