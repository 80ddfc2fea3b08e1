"""Attacks on the programs: kills at random moments, fuzzed command lines, damaged and odd files.

    python -m tests.campaign all --minutes 10 --seed 0      # or kills, flags, recipes, logs, ...

Not part of the suite; docs/robustness.md says what was tried and with which counts.
"""
