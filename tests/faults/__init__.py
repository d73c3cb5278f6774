"""Real faults: each ends in one sentence, loses nothing and makes no new key."""
