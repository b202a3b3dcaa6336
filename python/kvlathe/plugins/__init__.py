"""Plug-ins of servers. Each is imported by its server alone."""
