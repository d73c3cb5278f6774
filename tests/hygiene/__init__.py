"""Memory and log hygiene: whatever fails, no key or lock number is in what a process leaves or says."""
