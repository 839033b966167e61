"""What the subcommands share: parsing and its messages, configurations, plugins, the process, the run folder."""
