"""Analysis over HTTP."""
