"""What trains a drafter: conversations, anchors, losses, optimizers, the trainer."""
