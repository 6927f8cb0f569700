"""Tables, pictures and the report of a merge as people see them."""
