"""The ledger: run directories, durable steps, write-ahead logs, recovery.

``RunDir.open`` takes a run directory for one process; ``RunDir.step`` hands back what is committed under a name, or
an ``OpenStep`` to fill and commit.
"""
