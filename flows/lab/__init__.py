"""What shows the product to people: the demo, the real study, the measurement of speed."""
