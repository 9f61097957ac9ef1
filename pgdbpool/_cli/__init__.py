"""The command `pgdbpool` and its subcommands.

Nothing imports it but `__main__` and framework extensions: the work of a command belongs in another room.
"""
