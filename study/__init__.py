"""Many runs: grids and the schedulers that make them, results read back, findings with their statistics, figures, pages."""
