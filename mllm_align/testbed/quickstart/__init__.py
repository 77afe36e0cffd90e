"""The whole method on the synthetic testbed, from pictures to a report."""
