"""`python -m tappa`."""

from tappa.cli import main

if __name__ == "__main__":
    main()
