"""`python -m gvendi_fast.cli`: the command `gvendi`."""

from gvendi_fast.cli import main

if __name__ == "__main__":
    main()
