"""The same mathematics on a device that torch knows, equal bit for bit."""
