"""What an op is: its spellings, what its backward reads, how it runs and goes backward.

May be imported from here: ``rule`` (what a row says), ``table`` (the rows), ``backwards`` (what
their formulas are given), ``autocasting``, ``step_tables``, ``sides`` (of the places where a slope
jumps); of the families, ``masks`` for ``DROPOUT``, ``pooling`` for ``MAX_POOL`` and ``losses`` for
``reduction_enum``. Needs ``kernels`` only.
"""
