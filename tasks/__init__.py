"""What the flows are made of: storage, artifacts, benchmarks, tracking. Each task unpacks references and calls one function."""
