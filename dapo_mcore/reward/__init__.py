"""From a response to its score: built-in graders, users' functions, overlong penalty, and workers with deadlines.

Change here: another grader or calling convention (plugins.py), and how reward processes are run.
"""
