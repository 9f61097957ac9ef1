"""Groups and their pools: which connection a block gets, and whether it is lent again.

Nothing here sends a statement of the application.
"""
