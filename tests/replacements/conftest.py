"""Lets the tests of this folder share its helper modules, which importlib mode does not put on the path."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
