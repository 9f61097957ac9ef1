"""The servers: their state, role and lag, and the parameters to connect to them.

Nothing here knows of groups or blocks.
"""
