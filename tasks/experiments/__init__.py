"""Many merges compared: search, study, leaderboard."""
