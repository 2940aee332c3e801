"""The command `regrad`: compare, train, explain. Its modules are imported only when used."""
