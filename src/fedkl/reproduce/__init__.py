"""`fedkl reproduce`: the paper's tables, cell by cell, beside the print.

accuracy.py  Table 1
leakage.py   Tables 4, 5 and 6 and the threat grid: which rows, run how
records.py   their figures beside the paper's
gallery.py   their pictures
adaptive.py  the worst-rung matrix; arrangements.py: of what; ladder.py: the rungs; verdicts.py: what it says
frontier.py  the same beside what each arrangement costs in accuracy
cells.py     what the tables share
"""

from fedkl.reproduce.accuracy import (
    ARMS,
    Cell,
    Pairs,
    Row,
    Table1,
    markdown,
    summarized,
    table1,
    table1_rows,
)
from fedkl.reproduce.adaptive import ROWS, Matrix, adaptive
from fedkl.reproduce.arrangements import ARRANGEMENTS
from fedkl.reproduce.cells import Budget
from fedkl.reproduce.frontier import Frontier, frontier
from fedkl.reproduce.gallery import gallery
from fedkl.reproduce.ladder import RUNGS
from fedkl.reproduce.leakage import (
    DEFAULT_ARMS,
    LeakageRow,
    LeakageTable,
    all_arms,
    grid_arms,
    leakage,
    leakage_rows,
    rows_of,
)

__all__ = [
    "ARMS",
    "ARRANGEMENTS",
    "DEFAULT_ARMS",
    "ROWS",
    "RUNGS",
    "Budget",
    "Cell",
    "Frontier",
    "LeakageRow",
    "LeakageTable",
    "Matrix",
    "Pairs",
    "Row",
    "Table1",
    "adaptive",
    "all_arms",
    "frontier",
    "gallery",
    "grid_arms",
    "leakage",
    "leakage_rows",
    "markdown",
    "rows_of",
    "summarized",
    "table1",
    "table1_rows",
]
