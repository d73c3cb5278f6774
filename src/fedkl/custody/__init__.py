"""What a client holds for years, on its own disk: key, lock, private statistics, what it remembers.

* store.py: the clients of a node, a folder each
* ledger.py: what a node remembers of them beside their locks, so that nothing is lost unnoticed
"""

from fedkl.custody.ledger import Ledger
from fedkl.custody.store import ClientStore, StoredClient

__all__ = ["ClientStore", "Ledger", "StoredClient"]
