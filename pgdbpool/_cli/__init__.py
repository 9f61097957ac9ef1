"""The command `pgdbpool` and its subcommands.

Nothing imports it but `__main__` and framework extensions: what a command does belongs in another room.
"""
