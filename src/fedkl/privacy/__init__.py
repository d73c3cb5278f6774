"""What differential privacy a training gives: how much of it a client's rounds spend, and who keeps count.

accounting.py   ε of so many rounds
ledger.py       rounds by client, and a budget
ledgerfile.py   kept with the run
"""

from fedkl.privacy.accounting import GaussianCost, epsilon
from fedkl.privacy.ledger import Ledger, LedgerEntry, PrivacyOptions
from fedkl.privacy.ledgerfile import LedgerFile

__all__ = ["GaussianCost", "Ledger", "LedgerEntry", "LedgerFile", "PrivacyOptions", "epsilon"]
