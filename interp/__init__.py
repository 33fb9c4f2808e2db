"""Experiments on trained runs, each a program: python -m interp.units out/run. See README."""
