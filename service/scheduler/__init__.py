"""Policy only: who joins the batch, which KV row, how many prompt tokens a step. No torch."""
