"""What people see of a comparison: pictures and a page. Needs the extra `report` (matplotlib)."""
