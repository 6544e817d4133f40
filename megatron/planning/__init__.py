"""What a run would need and how long it would take, from its config alone: plain arithmetic, without torch or GPUs."""
