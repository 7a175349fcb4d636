"""The comparison of mechanisms: plan, trials, results, report."""
