"""Training loops of other libraries, each in a file that imports its library, but torchtitan's.

Nothing is imported from here but by users. Needs ``compile`` and ``report``.
"""
