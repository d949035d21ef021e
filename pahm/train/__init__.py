"""Training: losses, the Lightning module, the run folder and the trainer."""
