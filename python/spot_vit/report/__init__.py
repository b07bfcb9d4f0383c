"""What happened in a pass, to look at: traces, pictures, and one offline page."""
