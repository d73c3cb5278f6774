"""`fedkl reproduce`: the paper's tables, cell by cell, beside the print.

accuracy.py  Table 1
leakage.py   Tables 4, 5 and 6 and the threat grid: which rows, run how
gallery.py   their pictures
frontier.py  the audit's matrix beside what each arrangement costs in accuracy
defenses.py  every defense: what it costs, and what attackers who know it still read
published.py the paper's settings and figures
"""

from fedkl.attacking.arrangements import ARRANGEMENTS
from fedkl.attacking.attackers import RUNGS
from fedkl.attacking.matrix import ROWS, Matrix, adaptive
from fedkl.paper.published import Budget
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
from fedkl.reproduce.defenses import DefensesTable, compared, defenses
from fedkl.reproduce.frontier import Frontier, frontier
from fedkl.reproduce.gallery import gallery
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
    "DefensesTable",
    "Frontier",
    "LeakageRow",
    "LeakageTable",
    "Matrix",
    "Pairs",
    "Row",
    "Table1",
    "adaptive",
    "all_arms",
    "compared",
    "defenses",
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
