"""From files to tokens: model folders, prompts, chat rendering and the seeded order of training."""
