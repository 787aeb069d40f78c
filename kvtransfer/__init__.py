"""Moves KV blocks between address spaces: leases, digests, sender, receiver, transports.

Bytes and pointers only: this package knows no model and no engine.
"""
