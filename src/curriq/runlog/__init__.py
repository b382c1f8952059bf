"""A run's log: its schema, its writers and its readers. Knows no torch."""
