"""The benchmarks that this field is judged by, a file each. Each docstring has the rules that its figures
follow, with their source; docs/evaluation.md says where the data is had."""
