"""What an op is: its spellings, what its backward reads, how it runs and goes backward.

May be imported from here: ``rule`` (what a row says), ``table`` (the rows), ``autocasting``,
``step_tables``. ``runs``, ``backwards`` and ``pooling`` are named by rows. Needs ``kernels`` only.
"""
