"""What a finished file holds besides weights, and reports about it."""
