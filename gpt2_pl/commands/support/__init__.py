"""Parts shared by the commands: parsers, error messages, configurations, plugins, processes and run folders."""
