"""Code that runs inside a sandbox. It imports the standard library and itself only, so that no other file must be visible.

Words: a *box* is a process without network, with a read-only view of the system's and Python's folders. It loads modules
once and forks a *cell* for each call: a process with limits, a /tmp of its own and few system calls, which ends with the call.
"""
