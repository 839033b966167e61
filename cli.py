"""Run the command line from a checkout that is not installed: ``python cli.py fit ...``."""

from gpt2_pl.commands import main

if __name__ == "__main__":
    main()
