"""What a person looks at: rows and totals, a picture, a page.

May be imported from here: ``rows`` (``report``, ``Report``), and ``plot`` and ``palette`` for what
all pictures share. Needs ``passes`` and what stands below it.
"""
