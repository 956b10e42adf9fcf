"""Feature maps phi: what turns a query or key vector into features. File name = what recipes call it."""
