"""Attacks that learn from images of the server's own.

inversion.py   from clients that the server plays itself; kernels.py: the regression behind it
prior_only.py  the floor: a guess from the label alone
"""
