"""The attributes of the current request: its tenant and settings, its deadline, its correlation id.

Nothing here touches a connection.
"""
