"""torch.compile: the plug-in, the partitioner guard, and the layout of convolutions.

May be imported from here: ``backend`` (the backends, ``compiled_graphs``) and ``partition``
(``KeepPacked``). Needs every room but ``bench`` and ``integrations``.
"""
