"""The ranks: who am I, how do we meet, collectives, who is lost."""
