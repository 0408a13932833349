"""Reports as text. A renderer takes reports and gives text; it decides nothing."""
