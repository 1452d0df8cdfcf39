"""Plug-ins for other packages, which find them by their entry points.

Each imports the package that it plugs into only when that package asks for it.
"""
