"""Metrics, FreiHAND's protocol, evaluation, and reasons for failures."""
