"""Curation: from raw image-text shards to filtered, re-captioned, tagged ones. ``actors.curator`` runs it on Ray."""
