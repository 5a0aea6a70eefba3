"""Starts processes on machines and says how they ended."""
