"""Trains many runs, times and checks a step: python -m bench.sweep, bench.speed, bench.check."""
