"""The servers: their state and role, how far behind they are, and how one connects to them.

Nothing here knows of groups or blocks.
"""
