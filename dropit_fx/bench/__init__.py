"""What packing costs and gives, measured: ``dropit-fx bench`` and ``make gpu``.

May be imported from here: ``commands`` and ``frontier`` (the command line), ``model_spec``
and ``device``. Nothing else of dropit_fx but ``cli`` needs this room.
"""
