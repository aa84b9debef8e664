"""`circuits`, and `python -m circuits`."""

import os
import sys

from circuits.cli import main


def run() -> None:
    """The command line. One of several processes, as `torchrun` starts them, ends without taking the interpreter down.

    A thread of gloo may still be about to release a collective's tensors, for which it needs the interpreter; one that
    finds it finalizing is ended by force, which aborts the whole process ("terminate called without an active
    exception") although its work is done.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return main()
    try:
        main()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
