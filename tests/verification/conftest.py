"""Lets the tests of this folder share the tiny models of tests/engine."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
