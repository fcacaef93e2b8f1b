"""The gate: a fixed plan of cases that is red on a new confirmed finding, and on a ledger that is out of date.

plan.py      the list of cases, known before the first runs         changed.py   which ops a change touches
ledger.py    the findings already known                             imports.py   which files a target is made of
judge.py     bad cases, in the plan's order: known, new, flaky      engine.py    runs the plan
"""
