"""Code shared by tests: servers, small data, project folders, hosts."""
