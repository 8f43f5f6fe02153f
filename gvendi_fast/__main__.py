"""`python -m gvendi_fast`, and so `torchrun -m gvendi_fast`: the command `gvendi`."""

from gvendi_fast.cli import main

if __name__ == "__main__":
    main()
