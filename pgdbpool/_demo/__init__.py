"""The demo: a cluster, the example under gunicorn, and the tour that breaks things.

Nothing imports it but the command.
"""
