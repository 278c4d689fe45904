"""What a person looks at: rows and totals, a picture, a page, the predicted step as files.

May be imported from here: ``rows`` (``report``, ``Report``), ``origin``, and ``plot`` and
``palette`` for what all pictures share. Needs ``planner``, which tells the memory of a step, and
what stands below it.
"""
