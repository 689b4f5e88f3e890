"""Evaluation: metrics, results.json, tables and the HTML report."""
