"""How a packed call runs: what a rewritten graph calls, in eager mode and compiled.

May be imported from here: ``packed_call``. Needs ``codecs``, ``ops`` and ``kernels``.
"""
