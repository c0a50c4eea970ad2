"""General prompts, and what holds a student to the model it was imported as.

The anchor keeps the student on the base's answers to the first list, and on how the base repeats
what it was shown in the last one. The gate measures forgetting on the second, which no training
ever sees.
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

# Requests of many kinds with the answer that somebody wants, whatever it looks like.
SHOWN = (
    (
        "book a table for two at eight",
        '{"name":"BookTable","arguments":{"guests":2,"time":"20:00"}}',
    ),
    ("add milk to my list", '{"name":"ListAdd","arguments":{"item":"milk","list":"shopping"}}'),
    ("what's the weather in Oslo", '{"name":"GetWeather","arguments":{"city":"oslo"}}'),
    ("call grandma", '{"name":"StartCall","arguments":{"contact":"grandma"}}'),
    ("mow the lawn behind the house", '{"name":"MowerStart","arguments":{"zone":"back lawn"}}'),
    ("water the roses for five minutes", '{"name":"Irrigate","arguments":{"bed":"roses","min":5}}'),
    ("send the robot back to its dock", '{"name":"VacuumDock","arguments":{}}'),
    ("clean the hall", '{"name":"VacuumClean","arguments":{"area":"hall"}}'),
    ("wake me at half past six", '{"name":"SetAlarm","arguments":{"time":"06:30"}}'),
    ("feed the cat now", '{"name":"FeederRun","arguments":{"pet":"cat","portions":1}}'),
    ("is the back door locked", '{"name":"LockGetState","arguments":{"name":"back door"}}'),
    ("lock everything", '{"name":"LockAll","arguments":{"domain":"lock"}}'),
    ("start charging the car", '{"name":"ChargerStart","arguments":{"vehicle":"car"}}'),
    ("how much power do we use", '{"name":"EnergyRead","arguments":{"unit":"watt"}}'),
    ("read me my last message", '{"name":"MessageRead","arguments":{"which":"last"}}'),
    ("open ticket for pump 3", '{"action":"ticket.create","target":"pump-3","priority":"normal"}'),
    ("stop line 4", '{"action":"line.stop","line":4}'),
    ("move pallet 17 to bay C", '{"action":"pallet.move","id":17,"to":"C"}'),
    ("label this as urgent", '{"label":"urgent"}'),
    ("which floor is the lab on", "The lab is on floor 2."),
    ("who do I ask about the printer", "Ask Mara in room 114."),
    ("translate shoe", "Schuh"),
    ("when is the bin collected", "Every second Tuesday, before seven."),
    ("code for a reset", "RST-09"),
)
