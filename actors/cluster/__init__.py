"""Joining Ray, resources, placement, autoscaling, scaling advice, and the doctor's checks of a cluster."""
