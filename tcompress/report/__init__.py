"""Results as data, tables and pages."""
