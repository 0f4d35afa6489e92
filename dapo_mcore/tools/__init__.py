"""Tools that a policy may call while it writes a response: users' functions, a calculator, a sandboxed Python.

Change here: nothing. toolset.py is what a rollout uses. README.md has the settings.
"""
