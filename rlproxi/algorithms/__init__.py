"""One module for each algorithm, and what they share. ``guards`` watches a run of any of them."""
