"""Attacks on sd-hyena that write docs/faults.md: ``python -m faults [PART ...]``, or ``make faults`` for all of it."""
