"""Encoding and curation of data on the cluster."""
