"""How a model becomes a graph, and how we know that nothing was lost.

May be imported from here: ``trace`` (``capture``, ``CaptureError``), ``regions``, ``expand``,
``fake``, ``around``, ``graph_module``, ``example_inputs``, ``provenance``, ``untouched``. The
others serve these. Needs ``runtime`` and what stands below it; knows no pass, no config, no codec.
"""
