"""UniHema inside programs of others: a module for each, which imports that program's package."""
