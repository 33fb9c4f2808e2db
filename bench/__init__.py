"""Programs around training: python -m bench.speed. See README."""
