"""Code that runs inside SGLang's processes. It imports torch and the standard library alone: servers have an environment of
their own, which finds this folder on its PYTHONPATH (launch/servers.py)."""
