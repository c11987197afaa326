"""Curation of raw image-text shards: filters, duplicates, captions and tags. ``actors.data.curator`` runs it on Ray."""
