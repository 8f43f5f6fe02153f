"""How faithful sketches are and what synthesis does to a pool: studies of minutes to hours."""
