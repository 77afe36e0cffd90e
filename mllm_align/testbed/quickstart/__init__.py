"""The method on a testbed that the program draws itself, from pictures to a report."""
