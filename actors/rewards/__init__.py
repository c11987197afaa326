"""Ray Serve deployments around scorers."""
