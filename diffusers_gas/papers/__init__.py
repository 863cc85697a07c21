"""What serves the papers' tables: their networks, their files, and the measures of their evaluations."""
