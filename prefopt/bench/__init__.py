"""The benchmark harness: worlds, suites, measurements, reports."""
