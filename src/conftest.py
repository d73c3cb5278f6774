"""Doctests of what Flower is needed for run where Flower runs."""

from __future__ import annotations

import sys

collect_ignore = [] if sys.version_info >= (3, 11) else ["fedkl/flower"]
