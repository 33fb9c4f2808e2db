"""Experiments on trained runs, each a program: python -m interp.acdc out/run. README lists them."""
