"""The subcommands of ``gpt2-pl``, a file each."""
