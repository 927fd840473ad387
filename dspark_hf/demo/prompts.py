"""What the demo asks."""

DEMO_PROMPTS = (
    "A bakery sells 24 muffins in the morning and 18 in the afternoon. Each muffin costs $3. How much money does "
    "the bakery make in a day? Think step by step.",
    "Write a Python function that returns the n-th Fibonacci number, with a short explanation.",
    "What is photosynthesis, and why does it matter for life on Earth?",
    "Write a polite email that asks a colleague to move tomorrow's meeting to Friday.",
    "A train travels 60 miles in 1.5 hours. What is its average speed? Explain each step.",
    "List five tips for learning a new language.",
)
