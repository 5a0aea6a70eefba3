"""The ranks of a run: who each one is, how they meet, their collectives, and who is lost."""
