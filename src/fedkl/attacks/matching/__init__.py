"""Attacks that seek images whose update is the observed one.

dlg.py idlg.py inverting.py grnn.py ggl.py  one attack a file, named after its paper
structured.py    the same by an attacker who reads the network's structure first
gauss_newton.py  images and secrets together, by nonlinear least squares; annealing.py: how

objectives.py    the distance between updates, for many problems at once
lbfgs.py         L-BFGS over a batch of independent problems
restarts.py      the best point of every problem
"""
