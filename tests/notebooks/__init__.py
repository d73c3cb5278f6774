"""The notebooks of examples/: executed from a clean kernel, and their outputs stored.

executing.py       a clean kernel, and what is kept of what it gave
reading.py         what a notebook says, and what its cells printed
__main__.py        ``python -m tests.notebooks``: executes and stores them (`make notebooks`)
test_notebooks.py  they run, and what is stored belongs to what is there
"""
