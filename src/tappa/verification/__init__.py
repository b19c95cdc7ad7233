"""The paper's claims as commands: predicted, measured, error, and pass or fail."""
