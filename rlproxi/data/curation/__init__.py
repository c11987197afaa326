"""Curation: from raw image-text shards to filtered, re-captioned, tagged ones. ``actors.data.curator`` runs it on Ray."""
