"""Pictures, charts and videos."""
