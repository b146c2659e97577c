"""What tests share: servers, small data, project folders; no tests."""
