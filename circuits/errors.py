"""Errors that a user can act on. The command line prints them without a traceback and exits with code 2.

ValueError
├── CircuitsError        a model, a prompt, a target or a setting
├── ReplacementError     circuits.replacements: a trained dictionary or its file
└── GraphError           circuits.graph: a graph or its file
"""


class CircuitsError(ValueError):
    """Something about the model, the prompt, the target or a setting is not as it must be; the message says what."""
