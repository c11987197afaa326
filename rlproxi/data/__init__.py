"""Data: portraits, prompts, shards and their cache. ``curation`` filters and captions raw shards."""
