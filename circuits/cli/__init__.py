"""The command line. Commands import torch only when they run, so that `--help` answers at once."""

from circuits.cli.main import main

__all__ = ["main"]
