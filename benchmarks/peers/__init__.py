"""Other ways to serve many adapters, each in an environment of its own, driven like our own server.

`family.py` makes what all of them serve, `install.py` sets them up, `peer.py` says what a peer is; every
other module is one peer. None of them is a dependency of the product.
"""
