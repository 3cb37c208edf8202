"""The Hub: session, retry, one commit, its errors in one line; no room above is known here."""
