"""The live page's reader of a run directory."""
