"""Run the command line: ``python -m gpt2_pl fit ...``."""

from gpt2_pl.commands import main

if __name__ == "__main__":
    main()
