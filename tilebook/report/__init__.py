"""What people read: tables, explanations, the live view."""
