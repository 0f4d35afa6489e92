"""Responses with tools: turns of the policy, and the tools' output between them. README.md shows one episode.

Change here: how a policy calls tools. No module here depends on a particular engine.
"""
