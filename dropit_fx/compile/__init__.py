"""torch.compile: the plug-in, the partitioner guard, and the layout of convolutions.

May be imported from here: ``backend`` (the backends, ``compiled_graphs``), ``partition``
(``KeepPacked``), ``saved`` (what a partition saves) and ``fuse`` (which ops are attention). Needs
every room but ``bench`` and ``integrations``.
"""
