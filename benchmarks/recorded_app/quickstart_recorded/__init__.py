"""Flower's PyTorch quickstart, recorded by one line more."""
