"""Replies of models that describe them themselves, and chat templates that write calls."""
