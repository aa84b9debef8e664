"""Lets the tests of this folder share the tiny models of tests/engine and the plain run of tests/interventions."""

import sys
from pathlib import Path

import torch

for folder in ("engine", "interventions", "verification"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
torch.set_num_threads(1)
