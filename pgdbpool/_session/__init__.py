"""One connection and the block that uses it: transactions, cursors, and what goes before a statement.

Nothing here chooses a server, or decides whether a connection is lent again.
"""
