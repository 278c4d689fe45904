"""How a packed call runs: what a rewritten graph calls, in eager mode and compiled.

May be imported from here: ``packed_call`` (its functions), ``copies`` (what a packed copy is),
``regions`` (checkpointed ones), ``tensor_spec`` and ``overrides``. ``function`` runs a row. Needs
``codecs``, ``ops`` and ``kernels``.
"""
