"""The commands of the importer: `dapo-mcore import`, and the page of a table."""
