"""What runs on this machine alone: the local stack, the demo, the real study's models, measuring speed."""
