"""The findings of `pgdbpool check` and `ping` about servers, and their advice.

No request needs anything here.
"""
