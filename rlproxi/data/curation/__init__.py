"""Curation: from raw image-text shards to filtered, re-captioned, tagged ones. No Ray here; ``actors.curator`` runs it."""
