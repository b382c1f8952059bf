"""Judges finished runs: arms against a baseline, over seeds."""
