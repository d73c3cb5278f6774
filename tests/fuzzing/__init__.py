"""Fuzzing: everything that fedkl reads from a file, a network or a command line, with damaged input.

    python -m tests.fuzzing --seconds 3600                # all surfaces; goes on where the last call ended
    python -m tests.fuzzing --surface keys --inputs 500   # one surface, a counted number of inputs
    python -m tests.fuzzing --replay .fuzz/keys/findings/*/input
    python -m tests.fuzzing --list

An input is one `bytes`, whatever the surface; several files are packed into it. The contract of a surface:
the call returns, or raises a `FedKLError` with a text that can be printed. All else is a finding: another
exception, a hang, a crash, memory without bound, a file that is read, changed or deleted outside the
surface's own folder. docs of each surface are in surfaces/, findings of the past in corpus/.

archive.py    several named files as one input
contract.py   what is a finding, and how it is told
sandbox.py    the folder of an input, and what must stay as it is around it
surface.py    what a surface is
mutation.py   changes of bytes, and by format; trees.py, tensors.py and binaries.py are the formats
worker.py     one process that tries inputs; guided.py is the same under Atheris (libFuzzer)
coverage.py   which lines of the package an input has reached
state.py      what is kept on disk between calls
engine.py     starts workers, watches them, ends them
"""
