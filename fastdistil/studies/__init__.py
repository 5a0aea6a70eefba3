"""Commands that measure short trainings: profile and scale."""
