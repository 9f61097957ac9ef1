"""What `pgdbpool check` and `ping` find out about servers, and what they advise.

Nothing here is needed to serve a request.
"""
