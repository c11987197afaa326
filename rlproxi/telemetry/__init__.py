"""What a run records, its readers and exporters, and the catalogue of its metrics."""
