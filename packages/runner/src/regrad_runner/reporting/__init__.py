"""What people and programs are shown: tables, figures, the page, progress."""
