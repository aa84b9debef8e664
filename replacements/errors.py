"""What a user may have done wrong with a replacement.

ValueError
  ReplacementError        a file, tensor or setting of a replacement cannot be used
"""

from collections.abc import Sequence
from pathlib import Path


class ReplacementError(ValueError):
    """A replacement cannot be read, written, trained or used with this model.

    The message names the file, the tensor, the expected and the actual shape where there are such, and ends with what
    to do about it. It is written for the user: the command line prints it as it stands.
    """


def wrong_shape(
    path: Path | str, tensor: str, expected: Sequence[int | str], actual: Sequence[int]
) -> ReplacementError:
    """The error for a tensor whose shape is not the one that the rest of the file calls for."""
    want = "(" + ", ".join(str(size) for size in expected) + ")"
    have = "(" + ", ".join(str(size) for size in actual) + ")"
    return ReplacementError(
        f"{path}: tensor {tensor!r} should have shape {want} but has {have}; "
        "check that the file belongs to this replacement and was saved whole"
    )
