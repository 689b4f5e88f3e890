"""The interactive viewer, a web page."""
