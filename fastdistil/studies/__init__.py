"""Commands that start short trainings to measure them: profile, scale."""
