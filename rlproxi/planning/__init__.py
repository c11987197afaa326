"""What can be known of a run before it starts: its files, its memory, its plan."""
