"""Utilities of all parts: YAML and JSON, schemas of files, class registries, the machine, plots."""
