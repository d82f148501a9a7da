"""Moves the registry's alias ``champion`` to a candidate whose evaluation passes the gates, and can move it back."""
