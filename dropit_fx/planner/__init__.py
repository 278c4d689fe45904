"""How a step is brought under a peak: bytes in, a config out that keeps its word.

May be imported from here: ``plan`` and ``PlanError``; ``timeline`` (the memory of a step, told) and
``step``.
"""
