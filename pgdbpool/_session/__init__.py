"""One connection and the block that uses it: transactions, cursors, and the preamble of a statement.

Nothing here chooses a server, or decides whether a connection is lent again.
"""
