"""Lets the tests of this folder write the formats that tests/replacements write."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "replacements"))
torch.set_num_threads(1)
