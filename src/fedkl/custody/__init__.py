"""What a client holds for years, on its own disk: key, lock, private statistics, what it remembers.

* store.py: the clients of a node, a folder each
* ledger.py: what a node remembers of them beside their locks, so that nothing is lost unnoticed
* journal.py: what became of a client over the years
* member.py: a client's member of masked federations, in the same folder
* check.py, backup.py: what a store holds, and a client in one encrypted file
"""

from fedkl.custody.ledger import Ledger
from fedkl.custody.store import ClientStore, StoredClient

__all__ = ["ClientStore", "Ledger", "StoredClient"]
