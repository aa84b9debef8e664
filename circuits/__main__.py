"""`circuits`, and `python -m circuits`."""

from circuits.cli import main

if __name__ == "__main__":
    main()
