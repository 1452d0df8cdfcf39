"""Other packages that vlmcompress works with: plug-ins that they find, and batches by Ray.

Each module imports its package only when that is asked for.
"""
