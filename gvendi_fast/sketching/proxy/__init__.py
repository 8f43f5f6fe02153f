"""The proxy model: loading, attention, chat templates, encoding of rows."""
