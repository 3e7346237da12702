"""The report of a run: one HTML file that shows what came in, what came out and why."""
