"""The calls of an application: `Connection`, `Handler`, queries, one-shots, retries.

Nothing here keeps state but `Connection`; every other room can be used without it.
"""
