"""``python -m crossbit``: the command line without its script on the path."""

from crossbit.cli import main

if __name__ == "__main__":
    main()
