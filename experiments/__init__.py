"""One file per question; each says what it shows, its command, what it costs and what it gave."""
