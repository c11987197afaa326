"""The run log, the catalogue of metrics, exporters, and the reader of the live page."""
