"""Joining Ray, resources, placement, autoscaling, scaling advice, and what the doctor asks a cluster."""
