"""The findings of `pgdbpool check` and `ping` about servers, and their advice.

Nothing here is needed to serve a request.
"""
