"""General prompts whose answers the base model writes itself.

The anchor keeps the student on the base's answers to the first list; the gate measures forgetting
on the second, which no training ever sees.
"""

from __future__ import annotations

SYSTEM = "You are a helpful assistant."

ANCHOR = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "What is photosynthesis?",
    "Give me three tips for better sleep.",
    "Explain gravity to a child.",
    "Who wrote Romeo and Juliet?",
    "What is a prime number?",
    "Translate 'good morning' to Spanish.",
    "How does a bicycle stay upright?",
    "What should I cook with rice and tomatoes?",
    "Summarize the water cycle.",
    "Tell me a joke.",
    "What causes earthquakes?",
    "How many continents are there?",
    "What is machine learning?",
    "Name four fruits.",
    "How can I learn to play the guitar?",
    "What is the boiling point of water?",
    "Describe a sunset.",
    "What is democracy?",
    "How do vaccines work?",
    "Write a sentence with the word 'river'.",
    "What is the tallest mountain?",
    "How do plants grow?",
    "Why do cats purr?",
    "What is inflation?",
    "Give a synonym for happy.",
    "What does a heart do?",
)

GATE = (
    "What is the largest ocean?",
    "How do airplanes fly?",
    "Write a haiku about autumn.",
    "What is DNA?",
    "How do I write a good email?",
    "Name three planets.",
    "What is the difference between weather and climate?",
    "Explain what a computer program is.",
    "How do bees make honey?",
    "Who was Albert Einstein?",
    "What are the primary colors?",
    "How can I save money?",
    "What is a black hole?",
    "Give me a recipe for pancakes.",
    "Why is exercise important?",
    "What is the speed of light?",
    "How do magnets work?",
    "Write a short story about a dog.",
    "What is the stock market?",
    "How do I change a tire?",
)
