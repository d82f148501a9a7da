"""Folders and object storage behind one interface: what training and the services read shards from and write to.

The library knows nothing of S3 and training and services may not import one another, so what both need of it lies here.
"""
