"""Starts the processes of a run on its machines, and says how they ended."""
