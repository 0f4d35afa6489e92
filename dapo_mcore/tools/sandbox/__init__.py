"""The sandbox for model-written Python. It refuses to run code if its walls do not hold.

Change here: nothing. pool.py is the entrance; `inside/` has the code that runs within the walls.
"""
