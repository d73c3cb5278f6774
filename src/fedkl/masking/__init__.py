"""Masked sums: a server adds updates up that it cannot read; see docs/masked.md.

cards.py, roster.py    who the members are: private keys, cards, rules, the cohort's key
canonical.py           typed, length-prefixed bytes, of which every digest is one
schedule.py, keyring.py  the context of a round, and all keys that are derived from it
words.py, layout.py    numbers as words; where they lie in a message
stream.py, encoding.py masks; one pass: encode, tag, mask, and back
seal.py                tags that add up
sharing.py, quorum.py  shares of seeds, and how many it takes
messages.py            what is sent
member.py              the member's side; refusals.py, memory.py: what it refuses, what it must not forget
server.py, attempts.py the server's side; when it asks for reveals, and for whom
texts.py, fields.py    cards and rosters as text that is sent around
files.py, contents.py, memory_file.py  a member's encrypted files
"""

from fedkl.masking.cards import MemberCard, MemberKeys
from fedkl.masking.encoding import Contribution, Mean
from fedkl.masking.files import MemberFile
from fedkl.masking.layout import Layout
from fedkl.masking.member import Member
from fedkl.masking.memory import Memory
from fedkl.masking.messages import ListMessage, Reveal, SealedSum, Upload
from fedkl.masking.roster import Membership, Roster, Rules, SealedRoster, new_roster
from fedkl.masking.schedule import Call, Mode, Secret
from fedkl.masking.server import MaskedSum, opened_mean
from fedkl.masking.words import Words

__all__ = [
    "Call",
    "Contribution",
    "Layout",
    "ListMessage",
    "MaskedSum",
    "Mean",
    "Member",
    "MemberCard",
    "MemberFile",
    "MemberKeys",
    "Membership",
    "Memory",
    "Mode",
    "Reveal",
    "Roster",
    "Rules",
    "SealedRoster",
    "SealedSum",
    "Secret",
    "Upload",
    "Words",
    "new_roster",
    "opened_mean",
]
