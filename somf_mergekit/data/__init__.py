"""Dataset rows to chats, to pairs and prompts, to tokens and the log-probabilities of answers."""
