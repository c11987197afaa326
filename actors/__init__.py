"""The system: Ray lives here, the mathematics in rlproxi/."""
