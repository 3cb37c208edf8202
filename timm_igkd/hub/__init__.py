"""The Hub: session, retry, one commit, its errors in one line; no room above is known here."""

TIMEOUT_S = 60.0
"""Longest silence of the Hub before a request is given up and made again."""
