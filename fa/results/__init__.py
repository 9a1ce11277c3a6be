"""Runs, records, claims, pages and reports."""
