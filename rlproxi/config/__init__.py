"""The typed sections of a run's config, the YAML reader, overrides, and the generated reference."""
