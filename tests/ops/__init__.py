"""Tests of the op table; ``<family>.py``, named as in ``dropit_fx/ops/``, has a record of each row.

A package, so that ``op_cases`` imports the records by one name, whoever asks for them.
"""
