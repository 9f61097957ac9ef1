"""The configuration: its declarations, how it is read, and how it is checked.

Nothing here opens a connection, and it runs at `init` and `reload` only.
"""
