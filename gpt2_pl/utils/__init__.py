"""What every part uses: YAML and JSON, schemas, class registries, the machine, pictures."""
