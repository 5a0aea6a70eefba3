"""Models of transformers as hidden states, transform and vocabulary weight; students made of them; what they predict."""
