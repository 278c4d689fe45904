"""What a person looks at: rows and totals, a picture, a page.

May be imported from here: ``rows`` (``report``, ``Report``), ``page``, and ``plot`` for what all
pictures share. Needs ``passes`` and what stands below it.
"""
