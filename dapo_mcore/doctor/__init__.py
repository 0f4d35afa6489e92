"""`dapo-mcore doctor`: what a machine, or every node of a job, has for a run, what falls back, and what stands in its way.

Change here: a check. A check is a function from observations to Findings; what observes is beside it, so that tests can hand in
observations of machines that they do not run on.
"""
