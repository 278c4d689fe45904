"""How a packed call runs: what a rewritten graph calls, in eager mode and compiled.

May be imported from here: ``packed_call`` (its functions), ``linear_loss`` (those of fused losses),
``copies`` (what a packed copy is), ``regions`` (checkpointed ones), ``tensor_spec``, ``overrides``;
without a graph, ``checkpoints``, ``decisions``, ``followed``, ``saved_hooks``, ``saved_copies``
and ``saved_notes``.
``function`` runs a row, ``offload`` has packed bytes wait on the host, ``sampled_blocks`` runs a
block of which some rows have gradients. Needs ``codecs``, ``ops`` and ``kernels``.
"""
