"""What the demo asks: prompts of four kinds, written for it."""

DEMO_PROMPTS = {
    "calculation": (
        "A bakery sells 24 muffins in the morning and 18 in the afternoon. Each muffin costs $3. How much money does "
        "the bakery make in a day? Think step by step.",
        "A gardener plants 6 rows of 14 tulips, and 9 of them do not grow. How many tulips grow? Explain each step.",
        "A ferry takes 35 cars on each trip and makes 8 trips a day. How many cars does it take in 5 days? Think step "
        "by step.",
    ),
    "code": (
        "Complete this Python class with the methods `width`, `height` and `area`, and repeat the lines that are "
        "there:\n\n"
        "class Rectangle:\n"
        "    def __init__(self, left, top, right, bottom):\n"
        "        self.left = left\n"
        "        self.top = top\n"
        "        self.right = right\n"
        "        self.bottom = bottom\n",
        "Add type hints to this Python function and give the whole function back:\n\n"
        "def count_words(path, minimum=1):\n"
        "    counts = {}\n"
        "    with open(path) as file:\n"
        "        for line in file:\n"
        "            for word in line.split():\n"
        "                counts[word] = counts.get(word, 0) + 1\n"
        "    return {word: count for word, count in counts.items() if count >= minimum}\n",
        "Write a Python function that returns the n-th Fibonacci number, with a short explanation.",
    ),
    "correction": (
        "Correct the spelling of this text and give the whole text back:\n\n"
        "The old lighthouse stands at the end of the harbour. Every evening the keeper climbs the narow stairs and "
        "lights the lamp. Fishermen see it from far away and find thier way home. In winter the wind is so strong "
        "that the keeper stays in the lighthouse for many days.",
        "Correct the grammar of this text and give the whole text back:\n\n"
        "Our library opens at nine in the morning and close at six in the evening. Members may borrow five books for "
        "four weeks. Whoever returns a book too late pays a small fee. Children under twelve borrow books for free.",
        "Replace 'Monday' by 'Thursday' in this message and give the whole message back:\n\n"
        "Dear all, the meeting on Monday begins at ten o'clock in the large room on the second floor. Please bring "
        "your notes from last week. After the meeting on Monday there is lunch for everybody in the garden.",
    ),
    "question": (
        "What is photosynthesis, and why does it matter for life on Earth?",
        "Why do the leaves of many trees turn red and yellow in autumn?",
        "List five tips for learning a new language.",
    ),
}
MOST_PROMPTS = min(map(len, DEMO_PROMPTS.values()))
